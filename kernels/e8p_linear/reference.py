"""y = x W^T with W = scale * (E8P point + residual point / residual_scale), 2, 3 or 4 bits a weight."""

import torch
from torch import Tensor

from effbench.kernels._common.dense import multiply
from effbench.kernels.e8p_linear.codebook import decode, decode_one_bit


def dense(in_features: int, weight: Tensor, scale: Tensor, residual: Tensor | None, residual_scale: float) -> Tensor:
    """The decoded matrix, float32 [out, in]."""
    points = decode(weight)
    if residual is not None:
        stage = decode_one_bit if residual.dtype == torch.uint8 else decode
        points += stage(residual) / residual_scale
    return scale * points.flatten(1)


def e8p_linear(
    x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor | None = None, residual_scale: float = 1.0
) -> Tensor:
    """x [..., in] -> [..., out].

    weight    int16 [out, in / 8], one E8P12 code per 8 consecutive inputs
    scale     float32, one number
    residual  None, int16 [out, in / 8] (E8P12 again: 4 bits) or uint8 [out, in / 8] (E8: 3 bits)
    """
    return multiply(x, dense(x.shape[-1], weight, scale, residual, residual_scale))
