"""y = x W^T with W = scale * (E8P point + residual point / residual_scale), 2, 3 or 4 bits a weight."""

import torch
from torch import Tensor

from effbench.kernels._common.dense import multiply
from effbench.kernels.e8p_linear.codebook import decode_one_bit, points


def dense(in_features: int, weight: Tensor, scale: Tensor, residual: Tensor | None, residual_scale: float) -> Tensor:
    """The decoded matrix, float32 [out, in]."""
    decoded = looked_up(weight)
    if residual is not None:
        stage = decode_one_bit if residual.dtype == torch.uint8 else looked_up
        decoded += stage(residual) / residual_scale
    return scale * decoded.flatten(1)


def looked_up(codes: Tensor) -> Tensor:
    """Points of 16-bit codes, float32 [..., 8]."""
    table = points(codes.device)
    return table.index_select(0, codes.flatten().int() & 0xFFFF).view(*codes.shape, 8)


def e8p_linear(
    x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None = None, residual_scale: float = 1.0
) -> Tensor:
    """x [..., in] -> [..., out].

    weight    int16 [out, in / 8], one E8P12 code per 8 consecutive inputs
    scale     float32, one number
    residual  None, int16 [out, in / 8] (E8P12 again: 4 bits) or uint8 [out, in / 8] (E8: 3 bits)
    """
    return multiply(x, dense(x.shape[-1], weight, scale, residual, residual_scale))
