"""Numbers in 8 bits by one factor, with what the next factor is made of: the largest magnitude as it was before."""

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def choose_type(gradients: bool) -> torch.dtype:
    """E4M3 for weights and activations, E5M2, with its wider range, for gradients (arXiv:2209.05433, section 3)."""
    return E5M2 if gradients else E4M3


def fp8_quantize(
    x: Tensor, scale: Tensor, gradients: bool = False, counted: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, ...] -> bits of x * scale in E4M3, or E5M2 for `gradients`, uint8 [N, ...], max |x| and a count, both [].

    `scale` is float32 []. The cast saturates by a clamp of its own: what torch's does depends on format and version.
    It hides what is not finite; so that is counted before, and the largest magnitude is not finite, either. Both are of
    the rows that are `counted`, bool [N]; None: all.
    """
    wide = x.float()
    kind = choose_type(gradients)
    largest = torch.finfo(kind).max
    codes = (wide * scale).clamp(-largest, largest).to(kind)
    if counted is not None:
        wide = wide.masked_fill(~counted.view(-1, *[1] * (x.ndim - 1)), 0.0)
    return codes.view(torch.uint8), wide.abs().amax(), (~wide.isfinite()).sum()
