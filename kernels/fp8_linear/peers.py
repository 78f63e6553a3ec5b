"""The vendor's E4M3 product with a factor per token and per row, whose output is bfloat16."""

from collections.abc import Callable

import torch
from torch import Tensor

from effbench.kernels._common.launch import flatten_rows
from effbench.kernels.fp8_linear.reference import Fp8Matrix, quantize
from effbench.ops import Declined


def scaled_mm(x: Tensor, matrix: Fp8Matrix) -> Callable[[], Tensor]:
    """`torch._scaled_mm` with both factors in the one product; x is rounded to E4M3 within the call."""
    weight, scale, activations = matrix
    outputs, inputs = weight.shape
    if activations != "token" or scale.numel() == 1 or x.dtype != torch.bfloat16:
        raise Declined("takes E4M3 activations with a factor per token and per row, and bfloat16 outputs")
    if inputs % 16 or outputs % 16:
        raise Declined("takes sizes in multiples of 16")
    flat, shape, per_row = flatten_rows(x), (*x.shape[:-1], outputs), scale.T.contiguous()

    def call() -> Tensor:
        codes, factor = quantize(flat, activations)
        y: Tensor = torch._scaled_mm(codes, weight.T, scale_a=factor, scale_b=per_row, out_dtype=x.dtype)
        return y.view(shape)

    return call
