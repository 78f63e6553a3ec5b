"""Gradients of a scaled loss brought back, and whether they are finite."""

import torch
from torch import Tensor


def unscale(gradients: list[Tensor], inverse: float) -> Tensor:
    """Multiply gradients by `inverse`, in place; bool []: whether all are finite (arXiv:1710.03740, section 3.2)."""
    torch._foreach_mul_(gradients, inverse)
    return torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
