"""What selectors cost on the pool of 2,000, in seconds per 1,000 examples, beside one forward pass over them."""

from __future__ import annotations

import pytest

from effbench import probes, sources
from effbench.core import registry
from effbench.nn.files.load import open_run

pytestmark = pytest.mark.slow

SELECTORS = [key for key, entry in registry.catalog().items() if entry.kind == "Select"]


@pytest.mark.parametrize("key", SELECTORS)
def test_a_selector_costs_so_much(key: str) -> None:
    method = registry.load(key)()
    data = "tiny:task" if method.blind else "tiny:planted"  # prompts for those that buy answers
    run = open_run(sources.model("tiny"), sources.data(data), "cpu", None, 0)
    run.apply(method)
    found = probes.take("selection", run, {}).metrics
    own, forward = (found[f"select_{part}s_per_1000"].value for part in ("", "forward_"))
    print(f"{method.label}: {own:.2f} s per 1,000 examples, {own / forward:.1f} forward passes")
    assert own < 100 * forward + 1
