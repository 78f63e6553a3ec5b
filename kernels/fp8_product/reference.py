"""The product of two matrices of 8-bit floats, each with one factor, accumulated in float32."""

import torch
from torch import Tensor

from effbench.kernels.fp8_quantize.reference import E4M3, choose_type


def fp8_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, gradients: bool = False) -> Tensor:
    """A B^T in float32 [M, N] for the bits uint8 a [M, K] and b [N, K] of A * scale_a and B * scale_b.

    The factors are float32 []. b is E4M3, and a too, or E5M2 for `gradients`. Products of two such numbers are exact in
    float32; so only the order of the sums differs between backends.
    """
    wide = torch.promote_types(scale_a.dtype, torch.float32)
    total = a.view(choose_type(gradients)).to(wide) @ b.view(E4M3).to(wide).T
    return total * scale_a.reciprocal() * scale_b.reciprocal()
