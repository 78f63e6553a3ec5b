"""What selectors cost beside one forward pass of the pool that they choose from."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from effbench import sources
from effbench.core.recipe import parse_step
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun
from effbench.nn.train.examples import measure_losses

pytestmark = pytest.mark.slow

NUMBER, WIDTH = 2000, 64  # examples, and tokens in each
STEPS = [
    "random_selection()",
    "minhash_dedup()",
    "kmeans_diversity()",
    "dpp()",
    "dpp(draw='greedy')",
    "d2_pruning()",
    "hybrid()",
]


def opened() -> ModelRun:
    """The embedded model with a pool of so many short examples."""
    run = open_run(sources.model("tiny", None), sources.data("tiny"), "cpu", "float32", 0)
    few = itertools.islice(run.data.pool, NUMBER)
    run.data.pool = [dataclasses.replace(example, ids=example.ids[:WIDTH]) for example in few]
    assert run.reference is not None and len(run.data.pool) == NUMBER
    return run


def seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


@pytest.mark.parametrize("step", STEPS)
def test_what_a_selection_costs(step: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    run = opened()
    forward = seconds(lambda: measure_losses(run, run.reference, run.data.pool))
    took = seconds(lambda: run.apply(parse_step(step)))
    with capsys.disabled():
        print(
            f"\n{step}: {took / NUMBER * 1000:.2f} s per 1,000 examples, {took / forward:.2f} times one forward pass "
            f"of them ({forward / NUMBER * 1000:.2f} s)"
        )
