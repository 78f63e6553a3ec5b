"""Example: keeps the most recent tokens of the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from effbench.core.kinds import Evict
from effbench.core.views import Slots


@dataclass(frozen=True)
class Example(Evict):
    """What a reader of the paper should know first."""

    paper = "unpublished"  # or "arXiv:NNNN.NNNNN", and then published = "example()" or caveats = ("what differs",)
    identity = {"budget": 1_000_000, "keep": None}  # settings at which every token stays

    def score(self, slots: Slots, state: Any) -> Tensor:
        """[B, Hkv, S]: the slots with the largest stay, as many as `budget` or `keep` say."""
        return slots.position
