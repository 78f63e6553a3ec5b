"""Texts of two models together, whose distributions are mixed at every token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from effbench.nn.infer.engine import Engine, State, Use
from effbench.nn.infer.memory import Tokens


@dataclasses.dataclass
class Pair(State):
    """What both models have read."""

    parts: tuple[State, ...] = ()


class Mixture(Engine):
    """Two engines that read the same tokens; the next one is drawn from (1 - share) q + share p.

    q and p are the softmaxes of the first and the second over `temperature`, at which it is to be sampled. Its hidden
    states are those of both side by side.
    """

    def __init__(self, first: Engine, second: Engine, share: float, temperature: float = 1.0) -> None:
        super().__init__(first.model, first.plan, first.pad)
        self.engines = (first, second)
        self.share = share
        self.temperature = temperature
        self._kinds: list[tuple[int, torch.dtype]] = []  # width and type of each one's hidden states

    @property
    def max_length(self) -> int:
        return min(engine.max_length for engine in self.engines)

    def read(
        self,
        prompts: Sequence[Tokens],
        hold: Sequence[int] | None = None,
        apart: bool = False,
        croppable: bool = False,
    ) -> tuple[State, Tensor]:
        states, last = zip(*(engine.read(prompts, hold, apart, croppable) for engine in self.engines), strict=True)
        self.read_uses = self.engines[0].read_uses
        self._kinds = [(states.shape[-1], states.dtype) for states in last]
        return Pair(None, parts=states), torch.cat(last, -1)

    def extend(self, state: State, ids: Tensor, real: Tensor | None = None, body: bool = True, **options: Any) -> Any:
        assert isinstance(state, Pair)
        parts = zip(self.engines, state.parts, strict=True)
        outs = [engine.extend(part, ids, real, body, **options).last_hidden_state for engine, part in parts]
        return SimpleNamespace(last_hidden_state=torch.cat(outs, -1))

    def head(self, states: Tensor) -> Tensor:
        parts = states.split([width for width, _ in self._kinds], -1)
        q, p = (
            (engine.head(part.to(dtype)) / self.temperature).log_softmax(-1)
            for engine, part, (_, dtype) in zip(self.engines, parts, self._kinds, strict=True)
        )
        return self.temperature * torch.logaddexp(q + math.log1p(-self.share), p + math.log(self.share))

    def settle(self, state: State, ends_prompt: bool = False) -> None:
        assert isinstance(state, Pair)
        for engine, part in zip(self.engines, state.parts, strict=True):
            engine.settle(part, ends_prompt)

    def note(self, state: State, before: list[Use], reading: list[bool]) -> list[Use]:
        assert isinstance(state, Pair)
        return self.engines[0].note(state.parts[0], before, reading)
