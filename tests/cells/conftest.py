"""What tests of cells share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effbench.cells.job import Job, Place
from effbench.cells.options import RunOptions
from effbench.cells.plan import plan


@pytest.fixture
def plan_job(tmp_path: Path) -> Callable[..., Job]:
    """A job of a recipe on the embedded model, with a gate of the test's own, and with the points that it is tuned
    over."""

    def make(
        recipe: str, folder: Path = tmp_path, seed: int = 0, tune: list[str] | None = None, **settings: Any
    ) -> Job:
        options = RunOptions(recipe=recipe, device="cpu", results=str(folder / "runs"), seeds=[seed])
        batch = plan(options, {"probes": ["perplexity"], "text_tokens": 2048} | settings)
        job = batch.todo[-1].at([Place("cpu", folder / "gate.lock")])
        points = {"tune": tune} if tune else {}
        return dataclasses.replace(job, cell=dataclasses.replace(job.cell, settings=job.cell.settings | points))

    return make
