"""Numbers of what `kv_quantize` stored."""

import torch
from torch import Tensor

from effbench.kernels._common.packing import unpack


def kv_dequantize(words: Tensor, scale: Tensor, low: Tensor, bits: int, size: int) -> Tensor:
    """Groups [..., size] of int32 words [..., W], scale and least number [..., 1], in the type of the scale."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (unpack(words, bits, size).to(wide) * scale.to(wide) + low.to(wide)).to(scale.dtype)
