"""Orthonormal Walsh-Hadamard transform of the last dimension."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from effbench.kernels.hadamard.matrices import base, factors, sylvester

PIECE = 128  # largest factor of Sylvester's matrix that is multiplied by at once


class Rotation(NamedTuple):
    """H / sqrt(n), an orthogonal matrix [n, n] that is constructed and not stored."""

    transpose: bool = False

    def out_features(self, in_features: int) -> int:
        return in_features

    def dense(self, in_features: int) -> Tensor:
        """The matrix, float32 [n, n]."""
        return hadamard(torch.eye(in_features), self).T


def hadamard(x: Tensor, rotation: Rotation) -> Tensor:
    """x [..., n] -> H x / sqrt(n) (or H^T x / sqrt(n)), H = Sylvester(2^k) (x) base(m), n = 2^k m.

    Accumulated in float32 (float64 for float64 x). ValueError for an n of which no matrix is constructed.
    """
    n = x.shape[-1]
    power, m = factors(n)
    wide = torch.promote_types(x.dtype, torch.float32)
    # base(m) goes over the last m numbers ...
    inner = torch.from_numpy(base(m)).to(x.device, wide)
    y: Tensor = x.to(wide).reshape(-1, m)
    if m > 1:
        y = y @ (inner if rotation.transpose else inner.T)
    # ... and Sylvester's matrix over the others. It is a Kronecker power and symmetric: one piece at a time, as one
    # product.
    while power > 1:
        piece = min(power, PIECE)
        matrix = torch.from_numpy(sylvester(piece)).to(x.device, wide)
        power //= piece
        last = y.reshape(-1, piece, m).transpose(1, 2)  # [rows, m, piece]
        y = (last.reshape(-1, piece) @ matrix).view(last.shape).transpose(1, 2)
        m *= piece
    return (y.reshape(x.shape) / math.sqrt(n)).to(x.dtype)
