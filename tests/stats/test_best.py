"""The expected best of several draws, against all draws there are."""

from __future__ import annotations

import itertools
import statistics

import pytest

from effbench.stats.best import expect_least


@pytest.mark.parametrize("values", [[3.0], [2.0, 5.0], [4.0, 1.0, 1.0, 7.5]])
@pytest.mark.parametrize("draws", [1, 2, 3])
def test_it_is_the_mean_over_all_draws(values: list[float], draws: int) -> None:
    least = [min(drawn) for drawn in itertools.product(values, repeat=draws)]
    assert expect_least(values, draws) == pytest.approx(statistics.fmean(least))
