"""`fp8_linear` by the vendor's matrix product; only for inputs rounded to E4M3 and sizes it takes."""

import torch
from torch import Tensor

from effbench.kernels._common.launch import flatten_rows
from effbench.kernels.fp8_linear.reference import Fp8Matrix, quantize
from effbench.ops import Declined

KERNELS = r"e4m3|f8f8|nvjet_q"  # in the names of the library's kernels, as traces have them


def fp8_linear(x: Tensor, matrix: Fp8Matrix) -> Tensor:
    """See `reference.fp8_linear`; Declined for float activations, float32 outputs and sizes not in sixteens."""
    weight, scale, activations = matrix
    flat = flatten_rows(x)
    out_features, in_features = weight.shape
    if activations == "none" or x.dtype not in (torch.bfloat16, torch.float16):
        raise Declined("needs E4M3 activations and 16-bit outputs")
    if in_features % 16 or out_features % 16 or not len(flat):
        raise Declined("needs sizes in multiples of 16")
    codes, factor = quantize(flat, activations)
    # Factors per token and per row go together in one product, and its output is bfloat16 then; so the product is
    # left in float32 with unit factors, and scaled afterwards.
    one = torch.ones((), device=x.device)
    y = torch._scaled_mm(codes, weight.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return (y * factor * scale.T).to(x.dtype).view(*x.shape[:-1], out_features)
