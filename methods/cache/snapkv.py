"""SnapKV: the last queries of the prompt vote for what of it stays (Li et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effbench.core.kinds import Evict
from effbench.core.run import Run
from effbench.core.views import Slots


@dataclass(frozen=True)
class SnapKV(Evict):
    """Votes of the observation window, pooled over neighbours so that clusters stay whole; once, where the prompt ends.

    What comes after the prompt is kept, so that the cache grows while decoding.
    """

    paper = "arXiv:2404.14469"
    published = "snapkv(budget=2048)"
    caveats = ("with grouped queries a head of keys sums the votes of its group; the authors keep a copy for each",)
    type = "cache eviction"
    identity = {"budget": 1_000_000, "keep": None}
    trials = ({"keep": 0.5, "window": 4},)
    evicts_later = False

    window: int = 32  # last queries of the prompt, which vote and stay; half of the budget where that is less
    kernel: int = 5  # neighbours that votes are averaged over, an odd number

    def check(self) -> None:
        super().check()
        self.require(self.window >= 1, "window must be at least 1")
        self.require(self.kernel >= 1 and self.kernel % 2 == 1, "kernel must be an odd number")

    @property
    def observed(self) -> int:
        return self.window

    def open(self, run: Run) -> dict[str, Any]:
        return run.log.notes

    def recents(self, capacity: Tensor) -> Tensor:
        return torch.where(capacity > self.window, self.window, (capacity // 2).clamp(min=1))

    def score(self, slots: Slots, state: Any) -> Tensor:
        assert slots.votes is not None
        window = self.recents(slots.capacity)[:, None, None]
        if bool((window < self.window).any()):
            state["snapkv_least_window"] = min(int(window.min()), state.get("snapkv_least_window", self.window))
        number = torch.arange(-slots.votes.shape[2], 0, device=window.device)[:, None]
        votes = (slots.votes * (number >= -window[..., None])).sum(2)  # [B, Hkv, S]
        before = slots.valid & (slots.position < slots.seen[:, None, None] - window)
        pooled = nn.functional.avg_pool1d(votes * before, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled
