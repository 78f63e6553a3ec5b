"""Sliding window: every query sees the last tokens alone, and no more are cached (Mistral; Jiang et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.kinds import Cache


@dataclass(frozen=True)
class SlidingWindow(Cache):
    """Query i sees key j where 0 <= i - j < window; the token at place i is cached at i modulo window.

    Through the layers what a token knows reaches further back than the window.
    """

    paper = "arXiv:2310.06825"
    published = "sliding_window(window=4096)"
    caveats = ("put on a model that was trained without it; Mistral is trained with its window",)
    type = "attention"
    identity = {"window": 1_000_000}
    trials = ({"window": 8},)

    window: int = 1024  # W: tokens that a query sees, itself among them

    def check(self) -> None:
        self.require(self.window >= 1, "window must be at least 1")

    @property
    def reach(self) -> int:
        return self.window
