"""Processes that tests of engines share: starting them takes longer than what they do."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))
import divided
import engines

Ranks = list[dict[str, Any]]  # what each has found


def start_once(
    factory: pytest.TempPathFactory, work: Callable[[int, int, Path], None], ranks: int, last: int = 0
) -> Ranks:
    """What so many ranks have found, who are started by the first process of the tests that asks.

    Each is to end well, the last one with the exit code `last`.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{work.__module__}-{ranks}"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{rank}.pt" for rank in range(ranks)]
    with FileLock(folder / "lock"):
        if not all(file.exists() for file in files):
            context = multiprocessing.get_context("spawn")
            processes = [context.Process(target=work, args=(rank, ranks, folder)) for rank in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(300)
            assert [process.exitcode for process in processes] == [0] * (ranks - 1) + [last]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two ranks has to tell of engines that divide tensors, see `engines.work`."""
    return start_once(tmp_path_factory, engines.work, 2)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The same of four ranks."""
    return start_once(tmp_path_factory, engines.work, 4)


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ranks]:
    """What so many ranks have found of stages and experts, see `divided.work`."""
    return functools.cache(lambda ranks: start_once(tmp_path_factory, divided.work, ranks, -signal.SIGKILL))


@pytest.fixture
def pair(start: Callable[[int], Ranks]) -> Ranks:
    """What each of two ranks has found."""
    return start(2)


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, start: Callable[[int], Ranks]) -> Ranks:
    """What each of two, and of four ranks has found."""
    return start(request.param)
