"""Passes over examples: all are seen, and a killed one goes on to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effbench.checks import toy_run
from effbench.core.recipe import parse_step
from effbench.nn.run import ModelRun
from effbench.nn.train import examples, passes
from effbench.nn.train.passes import go_through


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few examples in a batch, and a copy of the state after each."""
    monkeypatch.setattr(examples, "TOKENS", 256)
    monkeypatch.setattr(passes, "EVERY", -1.0)


def total(run: ModelRun, name: str = "sums", most: int = 99) -> tuple[Tensor, int]:
    """Sums of the tokens of each example, from so many batches at most, and the number of batches seen."""
    state = {"sums": torch.zeros(64, dtype=torch.float64)}
    seen = 0

    def visit(places: list[int], batch: dict[str, Tensor]) -> None:
        nonlocal seen
        if seen == most:
            raise KeyboardInterrupt
        seen += 1
        state["sums"][places] += batch["input_ids"].sum(1)

    go_through(run, name, run.data.pool, state, visit)
    return state["sums"], seen


def test_a_killed_pass_goes_on(tmp_path: Path) -> None:
    run = toy_run()
    expected = torch.tensor([sum(example.ids) for example in run.data.pool], dtype=torch.float64)
    found, seen = total(run)
    assert torch.equal(found, expected) and seen == 8
    run.folder = tmp_path
    with pytest.raises(KeyboardInterrupt):
        total(run, most=3)
    found, seen = total(run)
    assert torch.equal(found, expected) and seen == 5
    assert total(run)[1] == 0  # what took long is kept to the end
    assert total(run, "others")[1] == 8
    run.data.pool = [*run.data.pool[1:], run.data.pool[0]]
    assert total(run)[1] == 8


STEPS = [
    "influence()",
    "trak(projection=16)",
    "trak(projection=16, steps=2, batch_size=4, max_length=32)",
    "datainf(steps=2, batch_size=4, max_length=32, rank=2)",
    "el2n(steps=2, times=2, batch_size=4, max_length=32)",
    "el2n(average='epochs', steps=2, times=2, batch_size=4, max_length=32)",
]


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_selection_goes_on_to_the_same_choice(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(folder: Path | None, most: int) -> tuple[Any, int]:
        run, told = toy_run(), 0
        run.folder = folder

        def tell(unit: str, *_: int) -> None:
            nonlocal told
            told += unit == "example"
            if told == most:
                raise KeyboardInterrupt

        run.progress = tell
        run.apply(parse_step(step))
        return [example.id for example in run.data.train], told

    expected, whole = choose(None, -1)
    with pytest.raises(KeyboardInterrupt):
        choose(tmp_path, whole - 2)
    found, rest = choose(tmp_path, -1)
    assert found == expected and rest < 6 < whole
