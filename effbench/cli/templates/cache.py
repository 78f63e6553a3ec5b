"""Example: keeps the most recent tokens of the cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effbench.core.kinds import Cache
from effbench.core.views import Slots


@dataclass(frozen=True)
class Example(Cache):
    """What a reader of the paper should know first."""

    paper = "unpublished"  # or "arXiv:NNNN.NNNNN", and then published = "example()" or caveats = ("what differs",)
    identity = {"budget": 1_000_000}  # settings at which every token stays

    budget: int = 64  # tokens kept by every key-value head

    def check(self) -> None:
        self.require(self.budget >= 1, "budget must be at least 1")

    def keep(self, layer: Slots) -> Tensor:
        """Indices of the cached tokens that stay, [B, Hkv, kept]."""
        position = layer.position.masked_fill(~layer.valid, -1)  # padding goes first
        return position.topk(min(self.budget, position.shape[-1]), -1).indices
