"""Rotary positions, in the one place where keys are rotated by other positions than transformers gives them.

While `unrotated` is entered a model projects queries and keys without rotating them; `rotate` does it afterwards, with
the model's own frequencies, whatever their scaling, and of as many dimensions of a head as the model rotates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported


class Unrotated(nn.Module):
    """Stands in for a model's rotary embedding and rotates by nothing."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.positions = torch.zeros(0)  # [B or 1, T] of the pass that goes on

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of angle 0, [B, T, R]."""
        self.positions = position_ids
        cos, sin = self.rotary(x, position_ids)
        return torch.ones_like(cos), torch.zeros_like(sin)


def has_rotary(model: Any) -> bool:
    """Whether the model rotates queries and keys; OPT and GPT-2 do not."""
    return isinstance(getattr(model.base_model, "rotary_emb", None), nn.Module)


def find_rotary(model: Any) -> nn.Module:
    """The model's rotary embedding. Raises `Unsupported` for a model that has none."""
    if not has_rotary(model):
        raise Unsupported(f"{model.config.model_type} has learned positions, which cannot be counted inside of a cache")
    rotary: nn.Module = model.base_model.rotary_emb
    return rotary


@contextlib.contextmanager
def unrotated(model: Any) -> Iterator[Unrotated]:
    """Have the model leave queries and keys unrotated inside; gives what knows how they would have been rotated."""
    rotary = find_rotary(model)
    if isinstance(rotary, Unrotated):
        yield rotary
        return
    model.base_model.rotary_emb = stand_in = Unrotated(rotary)
    try:
        yield stand_in
    finally:
        model.base_model.rotary_emb = rotary


def rotate(rotary: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """Queries or keys [B, H, T, D] at positions [B, H or 1, T]; pairs of entries half the rotated width apart."""
    flat = positions.flatten(0, 1)
    cos, sin = (part.unflatten(0, positions.shape[:2]).to(x.dtype) for part in rotary(x, flat))
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)
