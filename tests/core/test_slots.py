"""Every slot and chain of a plan is read by the machinery, and those of training are used by methods."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from toys_training import fit

from effbench.checks import PROMPT, toy_run
from effbench.core import registry
from effbench.core.kinds import Cache
from effbench.core.run import HOOKS, InferPlan, Plan, TrainPlan
from effbench.core.views import Codec, Slots
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.memory import remember
from effbench.nn.run import ModelRun

Read = set[tuple[str, str]]  # plans and their entries


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """What is read of plans."""
    seen: Read = set()
    for name in ("slot", "chain"):
        original = getattr(Plan, name)

        def watched(plan: Plan, entry: str, *rest: Any, original: Any = original) -> Any:
            seen.add((plan.name, entry))
            return original(plan, entry, *rest)

        monkeypatch.setattr(Plan, name, watched)
    return seen


@dataclasses.dataclass(frozen=True)
class Halves(Cache):
    """Keeps the last half of the cached tokens, in half of their bits."""

    def capacity(self, prompt: torch.Tensor) -> torch.Tensor:
        return prompt // 2

    def score(self, slots: Slots, state: Any) -> torch.Tensor:
        return slots.position.float()

    def codecs(self) -> tuple[Codec, Codec]:
        codec = Codec(lambda units: (units.half(),), lambda stored, width: stored[0].float())
        return codec, codec


def unread(plan: type[Plan], seen: Read) -> set[str]:
    return {*plan.slots, *plan.chains} - {entry for name, entry in seen if name == plan.name}


def infer(run: ModelRun) -> None:
    engine = open_engine(run)
    engine.generate([list(range(1, 25))], 4, set())
    run.rewrite(PROMPT)
    remember(run, [5, 6, 7], 2)


def test_a_fit_reads_all_of_its_plan(read: Read) -> None:
    run = toy_run()
    fit(run)
    assert not unread(TrainPlan, read)


def test_inference_reads_all_of_its_plan(read: Read) -> None:
    run = toy_run()
    run.apply(Halves())
    infer(run)
    assert not unread(InferPlan, read)


def test_what_inference_offers_is_used() -> None:
    """Some method writes each slot."""
    written = {slot for key in registry.catalog() for slot in registry.load(key)().slots()}
    assert {f"infer.{slot}" for slot in InferPlan.slots} <= written


def test_an_entry_that_nobody_reads_is_found(read: Read) -> None:
    class Grown(TrainPlan):
        slots = (*TrainPlan.slots, "forgotten")
        chains = (*TrainPlan.chains, "lost")

    run = toy_run()
    run.train = Grown()
    fit(run)
    assert unread(Grown, read) == {"forgotten", "lost"}


def test_what_training_offers_is_used() -> None:
    methods = [registry.load(key) for key in registry.catalog()]
    written = {slot for method in methods for slot in method().slots()}
    hooked = {hook for hook in HOOKS for method in methods if method().overrides(hook)}
    unused = {slot for slot in TrainPlan.slots if f"train.{slot}" not in written} | {*TrainPlan.chains} - hooked
    assert unused <= {"optimizer", "batch"}  # which tests of the loop drive
