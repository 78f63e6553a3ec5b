"""What tests share: private methods that misbehave, fakes that worker processes can import, ready-made jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers side by side on few cores would wait for each other

from effbench.cells.job import Job, Place
from effbench.records.record import Cell
from effbench.records.store import Store
from effbench.sources import DataSource, Source

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # worker processes inherit the path and find `fake_cells`


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch: several only get in each other's way on tensors as small as those of tests."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds the methods of `methods_for_tests`."""
    monkeypatch.setenv("EFFBENCH_METHODS", str(HERE / "methods_for_tests"))


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """Jobs that differ in the name of their recipe, with a speed gate of the test's own."""
    gate = tmp_path / "gate.lock"
    gate.touch()

    def make(recipe: str, steps: str = "", **settings: Any) -> Job:
        cell = Cell(
            suite="fakes",
            suite_version=1,
            tier="quick",
            recipe=recipe,
            steps=steps,
            resolved=(),
            model="tiny",
            data="tiny",
            seed=0,
            settings={"threads": 1, "dtype": None, "probes": [], **settings},
            digests={"model": recipe},
        )
        return Job(
            cell,
            Source("tiny", "tiny"),
            DataSource("tiny", "tiny"),
            (Place("cpu", gate),),
            probes=tuple(cell.settings["probes"]),
        )

    return make
