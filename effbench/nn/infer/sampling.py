"""Choosing the next token: the likeliest, or one drawn from a tempered, cut distribution."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effbench.core.errors import Usage


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Draws from the softmax of logits over a temperature, cut to its most probable tokens.

    Every prompt has chance of its own, by `seed` and its number, so that a text does not depend on its batch. Raises
    `Usage` for settings that mean nothing.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # the fewest tokens, most probable first, whose probabilities sum to this much stay
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise Usage(f"sampling: temperature is {self.temperature}; it must be a number that is at least 0")
        if not 0 < self.top_p <= 1:
            raise Usage(f"sampling: top_p is {self.top_p}; it must be above 0 and at most 1")

    def warp(self, logits: Tensor) -> Tensor:
        """Probabilities [..., V] of logits [..., V]; one that is 1 at temperature 0."""
        if not self.temperature:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(torch.float32)
        behind = logits.float() - logits.float().amax(-1, keepdim=True)  # so that low temperatures do not overflow
        probabilities = (behind.double() / self.temperature).softmax(-1).float()
        if self.top_p >= 1:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        cut = ordered.masked_fill(before >= self.top_p, 0.0)
        return torch.zeros_like(probabilities).scatter(-1, order, cut / cut.sum(-1, keepdim=True))

    def chances(self, numbers: Sequence[int]) -> list[torch.Generator]:
        """Chance for each of the prompts with these numbers, the same in every call."""
        return [torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**32) for number in numbers]

    def draw(self, logits: Tensor, chances: list[torch.Generator]) -> Tensor:
        """[B] tokens by logits [B, V], each by its own chance."""
        probabilities = self.warp(logits).cpu()
        drawn = [
            torch.multinomial(row, 1, generator=chance) for row, chance in zip(probabilities, chances, strict=True)
        ]
        return torch.cat(drawn).to(logits.device)
