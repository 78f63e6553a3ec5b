"""Processes that tests of engines share: starting them takes longer than what they do."""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Program, work

Found = list[dict[str, Any]]  # by each rank


def start_once(factory: pytest.TempPathFactory, program: Program, ranks: int) -> Found:
    """What so many ranks have found, who are started by the first process of the tests that asks; all end well, but
    for a last one that is killed."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{program.name}-{ranks}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():  # else they were started, and may have failed
            folder.mkdir()
            context = multiprocessing.get_context("spawn")
            processes = [context.Process(target=work, args=(program, rank, ranks, folder)) for rank in range(ranks)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(600)  # ranks that wait for another one end after 120 seconds by themselves
            last = -signal.SIGKILL if ranks in program.fatal else 0
            assert [process.exitcode for process in processes] == [0] * (ranks - 1) + [last]
            shutil.rmtree(folder / "scratch", ignore_errors=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Program, int], Found]:
    """What so many ranks have found in a program."""
    return functools.cache(functools.partial(start_once, tmp_path_factory))


@pytest.fixture
def two(request: pytest.FixtureRequest, start: Callable[[Program, int], Found]) -> Found:
    """What each of two ranks has found in the program of the tests."""
    return start(request.module.PROGRAM, 2)


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, start: Callable[[Program, int], Found]) -> Found:
    """What each of two, and of four ranks has found in it."""
    return start(request.module.PROGRAM, request.param)
