"""A fit reads all of the text, within the positions of the model, and says how much that was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from toys_training import fit

from effbench.checks import TOYS, VOCABULARY, toy_run
from effbench.core.errors import Unsupported
from effbench.core.kinds import Select, Train
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.run import ModelRun


def long_run(architecture: str = "llama", sizes: tuple[int, ...] = (1000, 700), **settings: Any) -> ModelRun:
    """A run on documents that are longer than a window."""
    run = toy_run(architecture, **settings)
    generator = torch.Generator().manual_seed(2)
    run.data.pool = [
        Example(f"d{i}", tuple(torch.randint(1, VOCABULARY, (size,), generator=generator).tolist()))
        for i, size in enumerate(sizes)
    ]
    return run


@dataclasses.dataclass(frozen=True)
class Reading(Train):
    """Takes down the windows that the fit reads."""

    def batch(self, batch: dict[str, Any], run: Run) -> dict[str, Any]:
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
        run.log.notes.setdefault("read", []).extend(tuple(row[:size]) for row, size in rows)
        return batch


def test_a_fit_reads_all_of_a_document() -> None:
    run = long_run()
    run.apply(Reading())
    report = fit(run, steps=14)  # 33 windows of 31 and 23 of 31 new tokens in batches of 4
    read = set(run.log.notes["read"])
    for example in run.data.pool:
        starts = range(0, len(example.ids) - 1, 31)
        assert {example.ids[i : i + 32] for i in starts} <= read
    assert report["available_tokens"] == 999 + 699 == report["distinct_tokens"] == report["tokens"]
    assert report["epochs"] == 1 and "left_out" not in report


def test_distinct_tokens_are_told_from_tokens() -> None:
    report = fit(long_run(sizes=(63,)), steps=3)  # two windows, twelve times
    assert (report["tokens"], report["distinct_tokens"], report["available_tokens"]) == (12 * 31, 62, 62)
    assert report["epochs"] == 6
    some = fit(long_run(sizes=(10_000,)), steps=1)
    assert some["tokens"] == some["distinct_tokens"] == 4 * 31 < some["available_tokens"] == 9999


@pytest.mark.parametrize("architecture", TOYS)
def test_lengths_are_bounded_by_the_positions(architecture: str) -> None:
    run = long_run(architecture)
    run.apply(Reading())
    fit(run, steps=1, max_length=2048)
    assert max(map(len, run.log.notes["read"])) == 256


def test_prompts_that_leave_nothing_to_learn_are_named_and_dropped() -> None:
    run = toy_run()
    ids = tuple(range(1, 61))
    run.data.pool = [
        Example("a:1", ids[:20], 10),
        Example("a:2", ids, 40),
        Example("a:3", ids, 31),
        Example("a:4", ids, 60),
    ]
    report = fit(run)
    assert report["available_tokens"] == 10 + 1 and torch.isfinite(torch.tensor(report["loss_last"]))
    assert report["left_out"] == "nothing to learn in 32 tokens of a:2, a:4; 1 answers cut at 32 tokens"
    assert len(run.data.train) == 4  # as before
    run.data.pool = run.data.pool[1::2]
    run.data.train = run.data.pool
    with pytest.raises(Unsupported, match=r"the train set: a:2, a:4 leave nothing to learn in 32 tokens.*max_length"):
        fit(run)


def test_samplers_and_hooks_see_the_windows_of_the_fit() -> None:
    class Last:
        def __init__(self) -> None:
            self.size = 0

        def draw(self, step: int, batch_size: int) -> list[int]:
            return [self.size - 1] * batch_size

    sampler = Last()

    @dataclasses.dataclass(frozen=True)
    class FromTheEnd(Reading):
        def sampler(self, examples: Any, run: Run) -> Last:
            assert len(examples) == len(run.data.train) == 33 + 23
            return sampler

        def batch(self, batch: dict[str, Any], run: Run) -> dict[str, Any]:
            sampler.size = len(run.data.train)
            return super().batch(batch, run)

    run = long_run()
    run.apply(FromTheEnd())
    sampler.size = 1
    fit(run, steps=2)
    assert sampler.size == 33 + 23
    assert run.log.notes["read"][-1] == run.data.pool[1].ids[31 * 22 :]
    assert run.data.train == run.data.pool and len(run.data.pool) == 2


def test_what_a_selection_left_is_cut_too() -> None:
    @dataclasses.dataclass(frozen=True)
    class Shortest(Select):
        def order(self, examples: Any, run: Any) -> list[int]:
            return [min(range(len(examples)), key=lambda i: len(examples[i].ids))]

    run = long_run()
    run.apply(Shortest())
    report = fit(run, steps=6)
    assert report["available_tokens"] == 699 and [example.id for example in run.data.train] == ["d1"]
