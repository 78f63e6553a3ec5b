"""StreamingLLM: the first tokens and the newest, placed as if nothing had been between them (Xiao et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from effbench.core.kinds import Cache
from effbench.core.run import Run
from effbench.core.views import Slots
from effbench.nn.model.rotary import find_rotary


@dataclass(frozen=True)
class StreamingLLM(Cache):
    """Attention rests on the first tokens whatever they say, so these sinks stay.

    Keys are cached before they are rotated; positions are those inside of the cache, so that they never grow beyond
    what the model was trained on (section 3.2 of the paper).
    """

    paper = "arXiv:2309.17453"
    published = "streaming_llm(sinks=4, window=1020)"
    type = "cache eviction"
    identity = {"window": 1_000_000}
    trials = ({"sinks": 2, "window": 8},)
    claims: ClassVar = ("infer.rope",)

    sinks: int = 4  # first tokens that stay
    window: int = 1024  # newest tokens that stay

    def check(self) -> None:
        self.require(self.sinks >= 0, "sinks must be at least 0")
        self.require(self.window >= 1, "window must be at least 1")

    def apply(self, run: Run) -> None:
        find_rotary(run.model)
        super().apply(run)

    def capacity(self, prompt: Tensor) -> Tensor:
        return prompt * 0 + self.sinks + self.window

    def score(self, slots: Slots, state: Any) -> Tensor:
        return torch.where(slots.position < self.sinks, torch.inf, slots.position.float())
