"""Processes that tests of engines share: starting them takes longer than what they do."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))
import divided
import engines

Ranks = list[dict[str, Any]]  # what each has found


def start_once(factory: pytest.TempPathFactory, start: Callable[[int, Path], Ranks], ranks: int, name: str) -> Ranks:
    """What so many ranks have found, who are started by the first process of the tests that asks."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"{name}-{ranks}"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        return start(ranks, folder)


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two ranks has to tell of engines that divide tensors, see `engines.work`."""
    return start_once(tmp_path_factory, engines.start, 2, "engines")


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The same of four ranks."""
    return start_once(tmp_path_factory, engines.start, 4, "engines")


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ranks]:
    """What so many ranks have found of stages and experts, see `divided.work`."""
    return functools.cache(lambda ranks: start_once(tmp_path_factory, divided.start, ranks, "divided"))


@pytest.fixture
def pair(start: Callable[[int], Ranks]) -> Ranks:
    """What each of two ranks has found."""
    return start(2)


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, start: Callable[[int], Ranks]) -> Ranks:
    """What each of two, and of four ranks has found."""
    return start(request.param)
