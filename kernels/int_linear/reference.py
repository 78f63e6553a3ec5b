"""y = x W^T with W = scale * (code - zero), integer codes of 2, 3, 4 or 8 bits."""

import torch
from torch import Tensor

from effbench.kernels._common.dense import multiply
from effbench.kernels._common.packing import unpack


def zero_points(scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The zero-points, int32 shaped like `scale`: unpacked, or 2^(bits - 1) where none are stored."""
    if zero is None:
        return torch.full_like(scale, 2 ** (bits - 1), dtype=torch.int32)
    return unpack(zero.T, bits, scale.shape[0]).T


def dense(
    in_features: int, weight: Tensor, scale: Tensor, zero: Tensor | None, g_idx: Tensor | None, bits: int
) -> Tensor:
    """The decoded matrix, float32 [out, in]."""
    groups = scale.shape[1]
    zeros = zero_points(scale, zero, bits)
    codes = unpack(weight, bits, in_features)
    if g_idx is not None:
        return scale.float()[:, g_idx.long()] * (codes - zeros[:, g_idx.long()])
    grouped = codes.view(len(codes), groups, -1) - zeros.unsqueeze(-1)
    return (grouped * scale.float().unsqueeze(-1)).flatten(1)


def int_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
    bits: int = 4,
) -> Tensor:
    """x [..., in] -> [..., out].

    weight  int32 [out, ceil(in * bits / 32)], codes packed along the input
    scale   float16 [out or 1, groups]; without `g_idx`, groups are in / groups consecutive inputs
    zero    int32 [ceil(rows of scale * bits / 32), groups], packed along the output; None: 2^(bits-1)
    g_idx   int16 or int32 [in], the group of every input (GPTQ's act-order with dynamic groups)
    """
    return multiply(x, dense(x.shape[-1], weight, scale, zero, g_idx, bits))
