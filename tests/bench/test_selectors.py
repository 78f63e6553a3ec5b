"""What selectors cost on a pool of 2,000, in seconds per 1,000 examples, beside one forward pass over the same ones."""

from __future__ import annotations

import time

import pytest

from effbench import probes, sources
from effbench.core import registry
from effbench.core.kinds import Select
from effbench.nn.files.load import open_run
from effbench.nn.train.examples import measure_losses

pytestmark = pytest.mark.slow

EXAMPLES = 2000
SELECTORS = [key for key, entry in registry.catalog().items() if entry.family == "select"]


@pytest.mark.parametrize("key", SELECTORS)
def test_a_selector_costs_so_much(key: str) -> None:
    cls = registry.load(key)
    method = cls() if issubclass(cls, Select) else cls(**cls.trials[0])  # of whose fits few steps are enough
    data = "tiny:task" if method.blind else "tiny:planted"  # prompts for those that buy answers
    run = open_run(sources.model("tiny"), sources.data(data), "cpu", None, 0)
    pool = run.data.pool
    assert len(pool) == EXAMPLES
    measure_losses(run, run.reference, pool[:100])  # to warm up
    begun = time.perf_counter()
    measure_losses(run, run.reference, pool)
    forward = (time.perf_counter() - begun) / EXAMPLES * 1000
    run.apply(method)
    own = probes.take("selection", run, {}).metrics["select_s_per_1000"].value
    assert own == pytest.approx(1000 * sum(report["seconds"] for report in run.log.selections) / EXAMPLES)
    print(
        f"{method.label}: {own:.3f} s per 1,000 examples, one forward pass {forward:.3f} s: {own / forward:.1f} of them"
    )
    assert 0 < own < 100 * forward + 1
