"""y = x W^T with W = scale * E4M3 weights; x as it is, or rounded to E4M3 per token or per tensor."""

import torch
from torch import Tensor

from effbench.kernels._common.dense import multiply

LARGEST = 448.0  # of E4M3


def dense(in_features: int, weight: Tensor, scale: Tensor, activations: str) -> Tensor:
    """The decoded matrix, float32 [out, in]."""
    return scale * weight.float()


def quantize(x: Tensor, activations: str) -> tuple[Tensor, Tensor]:
    """x [..., in] as E4M3 values and float32 factors, [..., 1] per "token" or [] per "tensor".

    The largest magnitude becomes 448; rounding saturates. Where x is not finite, neither is the factor, and so
    neither are the outputs.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if activations == "token" else x.abs().amax()
    factor = largest.clamp(min=1e-12) / LARGEST
    return (x / factor).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), factor


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, activations: str = "none") -> Tensor:
    """x [..., in] -> [..., out].

    weight       float8_e4m3fn [out, in]
    scale        float32 [out, 1] or [1, 1]
    activations  "none", "token" or "tensor"; the gradient of x treats this rounding as the identity
    """
    decoded = dense(x.shape[-1], weight, scale, activations)
    if activations == "none":
        return multiply(x, decoded)
    codes, factor = quantize(x, activations)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (multiply(codes.to(wide), decoded) * factor).to(x.dtype)
