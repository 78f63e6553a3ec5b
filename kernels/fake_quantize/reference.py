"""Numbers moved to the points of a uniform grid, with a gradient as if they had not been, inside of its range."""

import torch
from torch import Tensor


def fake_quantize(real: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """r -> S (q - Z) with q = clamp(round(r / S) + Z, low, high), in the type of `real`.

    Equations 1 and 12 of arXiv:1712.05877. The scale S, positive, and the zero Z, whole numbers, broadcast against
    `real`. Computed in float32 (float64 for float64 numbers). For gradients the rounding counts as the identity
    (straight-through, arXiv:1308.3432), and the clamp as what it is.
    """
    wide = torch.promote_types(real.dtype, torch.float32)
    steps = real.to(wide) / scale.to(wide)
    codes = steps + (steps.round() - steps).detach() + zero.to(wide)
    return ((codes.clamp(low, high) - zero.to(wide)) * scale.to(wide)).to(real.dtype)


def fake_quantize_gradient(grad_out: Tensor, real: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The gradient in `real`: as it came where the rounded code lies in [low, high], 0 where it was clamped."""
    wide = torch.promote_types(real.dtype, torch.float32)
    codes = (real.to(wide) / scale.to(wide)).round() + zero.to(wide)
    return grad_out * ((codes >= low) & (codes <= high))
