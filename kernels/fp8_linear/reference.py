"""y = x W^T with W = scale * E4M3 weights; x as it is, or rounded to E4M3 per token or per tensor."""

from typing import NamedTuple

import torch
from torch import Tensor

from effbench.ops import multiply

LARGEST = 448.0  # of E4M3


class Fp8Matrix(NamedTuple):
    """W [out, in] as E4M3 numbers and their factors, and how x is rounded before it is multiplied."""

    weight: Tensor  # float8_e4m3fn [out, in]
    scale: Tensor  # float32 [out, 1] or [1, 1]
    activations: str = "none"  # "none", "token" or "tensor"; the gradient of x treats this rounding as the identity

    def out_features(self, in_features: int) -> int:
        return self.weight.shape[0]

    def dense(self, in_features: int) -> Tensor:
        """The decoded matrix, float32 [out, in]."""
        return self.scale * self.weight.float()


def quantize(x: Tensor, activations: str) -> tuple[Tensor, Tensor]:
    """x [..., in] as E4M3 values and float32 factors, [..., 1] per "token" or [] per "tensor".

    The largest magnitude becomes 448; rounding saturates. Where x is not finite, neither is the factor, and so
    neither are the outputs.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if activations == "token" else x.abs().amax()
    factor = largest.clamp(min=1e-12) / LARGEST
    return (x / factor).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), factor


def fp8_linear(x: Tensor, matrix: Fp8Matrix) -> Tensor:
    """x [..., in] -> [..., out]."""
    decoded = matrix.dense(x.shape[-1])
    if matrix.activations == "none":
        return multiply(x, decoded)
    codes, factor = quantize(x, matrix.activations)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (multiply(codes.to(wide), decoded) * factor).to(x.dtype)
