"""Intervals of single readings, against their formulas written out."""

from __future__ import annotations

import math
import random
import statistics
import warnings

import pytest
from scipy.special import bdtr, ndtri, stdtrit

from effbench.stats import intervals

SIZES = (6, 7, 10, 31, 100, 1000)


def draw(n: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(3, 2) for _ in range(n)]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_wilson(n, share):
    hits = [float(i < round(share * n)) for i in range(n)]
    metric, z, p = intervals.fraction(hits), float(ndtri(0.975)), sum(hits) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (metric.value, metric.n) == (p, n)
    assert metric.low == pytest.approx(max(0.0, middle - reach), abs=1e-12)
    assert metric.high == pytest.approx(min(1.0, middle + reach), abs=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_student(n):
    values = draw(n)
    metric = intervals.mean(values, intervals.exp)
    middle = statistics.fmean(values)
    reach = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    assert (metric.value, metric.n) == (math.exp(middle), n)
    assert (metric.low, metric.high) == pytest.approx((math.exp(middle - reach), math.exp(middle + reach)))


@pytest.mark.parametrize("n", SIZES)
def test_a_mean_is_the_quotient_of_items_of_one_size(n):
    values = draw(n)
    one, other = intervals.mean(values), intervals.quotient(values, [1.0] * n)
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high))


@pytest.mark.parametrize("n", SIZES)
def test_sign_test(n):
    """The narrowest pair of order statistics, alike on both sides, that covers the median with 95 %."""
    values, outside = draw(n), 0
    while 2 * bdtr(outside, n, 0.5) <= 0.05:
        outside += 1
    metric, ordered = intervals.median(values, lambda value: -value), sorted(values)
    assert (metric.low, metric.high) == (-ordered[n - outside], -ordered[outside - 1])
    assert metric.value == -statistics.median(values)


@pytest.mark.parametrize("kind", [intervals.fraction, intervals.mean, intervals.median])
def test_equal_values(kind):
    """Without a warning: they are nothing unusual where a model always answers alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = kind([1.0] * 8)
    assert metric.value == metric.high == 1.0 and 0.5 < metric.low <= 1.0


def test_too_few_values_have_no_interval():
    assert intervals.mean([2.0]).low is None
    assert intervals.quotient([2.0], [3.0]).high is None
    assert intervals.median([1.0, 2.0, 3.0, 4.0, 5.0]).low is None
