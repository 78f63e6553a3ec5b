"""H2O: tokens that have received most attention, and the newest (Zhang et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from effbench.core.kinds import Evict
from effbench.core.views import Slots


@dataclass(frozen=True)
class H2O(Evict):
    """Heavy hitters: F(j) = sum over all queries so far of the attention that token j has received (algorithm 1).

    Per layer and head, summed over the queries of a group of heads; at the end of the prompt and after every token. The
    score of an evicted token goes with it.
    """

    paper = "arXiv:2306.14048"
    published = "h2o(keep=0.2, recent=0.5)"
    caveats = ("with grouped queries a head of keys sums what its group pays; the paper has a head of keys for each",)
    type = "cache eviction"
    identity = {"budget": 1_000_000, "keep": None}
    trials = ({"keep": 0.5},)
    usual = 0.2
    observes = True

    recent: float = 0.5  # share of what is kept that are the newest tokens, in [0, 1]

    def check(self) -> None:
        super().check()
        self.require(0 <= self.recent <= 1, "recent is a share of what is kept, in [0, 1]")

    def recents(self, capacity: Tensor) -> Tensor:
        return (capacity * self.recent).round().long()

    def score(self, slots: Slots, state: Any) -> Tensor:
        assert slots.mass is not None
        return slots.mass
