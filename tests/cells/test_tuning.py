"""A tuned row: its settings are tried at one seed, and the rows of all seeds are at what was chosen there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effbench.cells import execute as cells
from effbench.cells.job import Job
from effbench.records.record import Record

Run = Callable[..., Record]
POINTS = ["fit(steps=3, max_length=16, lr=0.003)", "fit(steps=3, max_length=16, lr=1e-05)"]  # the second is better


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seed of each grid that is tried."""
    seeds: list[int] = []
    try_points = cells._try_points

    def watch(job: Job, *given: Any) -> Any:
        seeds.append(job.cell.seed)
        return try_points(job, *given)

    monkeypatch.setattr(cells, "_try_points", watch)
    return seeds


@pytest.fixture
def run(plan_job: Callable[..., Job]) -> Run:
    """Executes a tuned row in a folder, at a seed."""

    def run(folder: Path, seed: int, points: list[str] = POINTS) -> Record:
        return cells.execute(plan_job(points[0], folder, seed, points))

    return run


def test_other_seeds_read_what_was_chosen_and_are_fitted_anew(tmp_path: Path, run: Run, tried: list[int]) -> None:
    first, second = run(tmp_path, 0), run(tmp_path, 1)
    assert first.outcome == second.outcome == "ok", (first.reason, second.reason)
    assert tried == [0]
    assert first.log["tuning"] == second.log["tuning"] and len(first.log["tuning"]) == len(POINTS)
    assert first.log["fits"][0]["lr"] == second.log["fits"][0]["lr"] == 1e-05
    assert first.metrics["token_ppl"].value != second.metrics["token_ppl"].value
    assert (first.cell.seed, second.cell.seed) == (0, 1)


def test_a_seed_by_itself_chooses_as_the_first_does_and_measuring_anew_tries_anew(
    tmp_path: Path, run: Run, tried: list[int]
) -> None:
    alone = run(tmp_path / "a", 1)
    again = [run(tmp_path / "b", 0), run(tmp_path / "b", 0)]
    assert tried == [0, 0, 0]
    losses = [[point["loss"] for point in record.log["tuning"]] for record in (alone, *again)]
    assert losses[0] == losses[1] == losses[2]


def test_other_grids_are_tried_by_themselves(tmp_path: Path, run: Run, tried: list[int]) -> None:
    run(tmp_path, 0)
    other = run(tmp_path, 1, POINTS[:1])
    assert tried == [0, 0] and len(other.log["tuning"]) == 1


def test_a_grid_without_a_finite_loss_diverges_at_every_seed(tmp_path: Path, run: Run, tried: list[int]) -> None:
    points = ["fit(steps=2, max_length=16, lr=1e+30, warmup=0.0)"]
    found = [run(tmp_path, seed, points) for seed in (0, 1)]
    assert [record.outcome for record in found] == ["diverged", "diverged"], found[0].reason
    assert "not finite at any of 1 points" in found[1].reason and tried == [0]
