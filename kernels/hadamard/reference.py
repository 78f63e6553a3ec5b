"""Orthonormal Walsh-Hadamard transform of the last dimension."""

import math

import torch
from torch import Tensor

from effbench.kernels.hadamard.matrices import base, factors, sylvester


def hadamard(x: Tensor, transpose: bool = False) -> Tensor:
    """x [..., n] -> H x / sqrt(n) (or H^T x / sqrt(n)), H = Sylvester(2^k) (x) base(m), n = 2^k m.

    Accumulated in float32 (float64 for float64 x). ValueError for an n of which no matrix is constructed.
    """
    n = x.shape[-1]
    power, m = factors(n)
    wide = torch.promote_types(x.dtype, torch.float32)
    inner = torch.from_numpy(base(m)).to(x.device, wide)
    y: Tensor = x.to(wide).reshape(*x.shape[:-1], power, m) @ (inner if transpose else inner.T)
    while power > 1:  # Sylvester's matrix is a Kronecker power and symmetric: one piece at a time
        piece = min(power, 64)
        matrix = torch.from_numpy(sylvester(piece)).to(x.device, wide)
        power //= piece
        y = matrix @ y.reshape(*x.shape[:-1], power, piece, m)
        m *= piece
    return (y.reshape(x.shape) / math.sqrt(n)).to(x.dtype)
