"""Groups of keys or values in few bits, each with the range of its own numbers."""

import torch
from torch import Tensor

from effbench.kernels._common.packing import pack


def kv_quantize(x: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [..., L] in 2, 4 or 8 bits: int32 words [..., W], and scale and least number [..., 1] in the type of x.

    Code c stands for least + c * scale. Codes are those of the scale as it is stored, so that rounding it costs no more
    than half a step. A group of equal numbers has scale 0 and comes back exactly. Of a `symmetric` group the largest
    magnitude is 2^(bits-1) - 1 steps and code 2^(bits-1) is 0, so that the least number follows from the scale.
    """
    levels = 2**bits - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    if symmetric:
        middle = 2 ** (bits - 1)
        scale = (x.abs().amax(-1, keepdim=True).to(wide) / (middle - 1)).to(x.dtype)
        codes = ((x.to(wide) / scale.to(wide)).round().nan_to_num(0.0) + middle).clamp(0, levels)
        return pack(codes.to(torch.int32), bits), scale, -middle * scale
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high.to(wide) - low.to(wide)) / levels).to(x.dtype)
    steps = (x.to(wide) - low.to(wide)) / scale.to(wide)
    codes = steps.round().nan_to_num(0.0).clamp(0, levels)  # 0 / 0 where all numbers are equal
    return pack(codes.to(torch.int32), bits), scale, low
