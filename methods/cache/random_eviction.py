"""Random eviction: the floor of all that choose which tokens of the cache stay."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from effbench.core.kinds import Evict
from effbench.core.run import Run
from effbench.core.views import Slots

DRAWN = 1024  # places whose luck is drawn together


@dataclass(frozen=True)
class RandomEviction(Evict):
    """A token's luck is drawn once, by its place, layer and head, so that it does not depend on when it is judged."""

    paper = "unpublished"
    caveats = ("a floor: half of what is kept are the newest tokens, as h2o has it",)
    type = "cache eviction"
    identity = {"budget": 1_000_000, "keep": None}
    trials = ({"keep": 0.5},)

    recent: float = 0.5  # share of what is kept that are the newest tokens, in [0, 1]

    def check(self) -> None:
        super().check()
        self.require(0 <= self.recent <= 1, "recent is a share of what is kept, in [0, 1]")

    def open(self, run: Run) -> int:
        return run.seed

    def recents(self, capacity: Tensor) -> Tensor:
        return (capacity * self.recent).round().long()

    def score(self, slots: Slots, state: int) -> Tensor:
        heads, tokens = slots.position.shape[1], int(slots.seen.max())
        luck = torch.stack([_draw(state, slots.layer, head, -(-tokens // DRAWN)) for head in range(heads)])
        places = slots.position.long().clamp(min=0)
        return luck.to(places.device).expand(len(places), -1, -1).gather(2, places)


@functools.lru_cache(maxsize=1024)
def _draw(seed: int, layer: int, head: int, times: int) -> Tensor:
    """Luck of the first `times` x `DRAWN` places."""
    chances = [torch.Generator().manual_seed(hash((seed, layer, head, number))) for number in range(times)]
    return torch.cat([torch.rand(DRAWN, generator=chance) for chance in chances])
