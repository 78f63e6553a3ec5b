"""Tests of measurements without a partner: scipy's Welch where nothing is trimmed, and nominal rates."""

import math

import numpy as np
import pytest
from scipy import stats

from effbench.stats.paired import Estimate
from effbench.stats.unpaired import compare_intervals, compare_means, trimmed_mean


def test_of_few_values_it_is_welch():
    """Four values have no fifth at an end."""
    left, right = [1.0, 2.0, 4.0, 3.0], [2.5, 6.0, 3.0]
    theirs = stats.ttest_ind(right, left, equal_var=False)
    found = compare_means(left, right)
    assert (found.value, found.p) == pytest.approx((np.mean(right) - np.mean(left), theirs.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))
    back = compare_means(right, left)
    assert (back.value, back.p) == pytest.approx((-found.value, found.p)) and back.n == found.n == 7


def test_a_spoiled_value_costs_little():
    rng = np.random.default_rng(0)
    left, right = rng.normal(0, 0.01, 12), rng.normal(0.1, 0.01, 12)
    left[3] = 5.0
    found = compare_means(left, right)
    assert found.value == pytest.approx(0.1, abs=0.02) and found.p < 1e-6
    assert stats.ttest_ind(left, right, equal_var=False).pvalue > 0.3


def test_without_spread():
    assert compare_means([1.0, 1.0], [1.0, 1.0, 1.0]) == Estimate(0.0, n=5)
    found = compare_means([1.0] * 3, [2.0] * 3)
    assert found.p == pytest.approx(2 / math.comb(6, 3)) and found.value == 1.0 and found.low is None
    one = compare_means([1.0], [3.0, 4.0])
    assert one.p == 1 and one.low is None and one.value == 2.5
    with pytest.raises(ValueError, match="no values"):
        compare_means([], [1.0])


@pytest.mark.parametrize("heavy", [False, True])
def test_equal_sides_differ_at_the_nominal_rate(heavy):
    """Unlike spreads and sizes, and tails as timings have them; the interval misses zero as often."""
    rng = np.random.default_rng(1)
    alarms = missed = 0
    for _ in range(400):
        left, right = rng.normal(0, 1, 8), rng.normal(0, 3, 14)
        if heavy:
            left, right = rng.standard_t(3, 8), 2 * rng.standard_t(3, 14)
        found = compare_means(left, right)
        alarms += found.p <= 0.05
        missed += not found.low <= 0 <= found.high
    assert alarms == missed
    assert stats.binomtest(alarms, 400, 0.05, alternative="greater").pvalue > 0.01


def test_intervals_are_taken_as_normal_and_independent():
    reach = stats.norm.ppf(0.975)
    found = compare_intervals(Estimate(1.0, 1 - 3 * reach, 1 + 3 * reach), Estimate(9.0, 9 - 4 * reach, 9 + 4 * reach))
    assert found.value == 8 and (found.high - found.low) / 2 == pytest.approx(5 * reach)
    assert found.p == pytest.approx(2 * stats.norm.sf(8 / 5))
    assert compare_intervals(Estimate(1.0), Estimate(2.0, 1.0, 3.0)) is None


def test_the_trimmed_mean_is_scipys():
    values = [3.0, 9.0, 1.0, 100.0, 2.0]
    assert trimmed_mean(values) == pytest.approx(np.mean([3.0, 9.0, 2.0]))
