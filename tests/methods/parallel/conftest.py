"""Processes that tests of engines share: starting them takes longer than what they do."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import divided
import engines

Ranks = list[dict[str, Any]]  # what each has found, see `divided.work`


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two ranks has to tell of engines that divide a model."""
    return engines.start(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of four ranks has to tell of engines that divide a model."""
    return engines.start(4, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Ranks]:
    """What so many ranks have found of stages and experts; they are started once."""

    @functools.cache
    def run(number: int) -> Ranks:
        return divided.start(number, tmp_path_factory.mktemp("divided"))

    return run


@pytest.fixture
def pair(start: Callable[[int], Ranks]) -> Ranks:
    """What each of two ranks has found."""
    return start(2)


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, start: Callable[[int], Ranks]) -> Ranks:
    """What each of two, and of four ranks has found."""
    return start(request.param)
