"""95 % intervals for the kinds of number that probes take. Where nothing can be said, bounds are absent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from scipy import stats

from effbench.records.metric import Metric

Z = float(stats.norm.ppf(0.975))
MEDIAN_NEEDS = 6  # fewest values whose range covers the median with 95 %


def fraction(hits: Sequence[float]) -> Metric:
    """Share of ones among zeros and ones, Wilson's interval."""
    n, ones = len(hits), sum(hits)
    interval = stats.binomtest(int(ones), n).proportion_ci(method="wilson")
    return Metric(ones / n, float(interval.low), float(interval.high), n)


def mean(values: Sequence[float], scale: Callable[[float], float] = float) -> Metric:
    """`scale` (monotone) of the mean and of its Student-t bounds, taking the values as independent."""
    n, middle = len(values), statistics.fmean(values)
    if n < 2:
        return Metric(scale(middle), n=n)
    return _student(scale, middle, statistics.stdev(values) / math.sqrt(n), n)


def quotient(sums: Sequence[float], sizes: Sequence[float], scale: Callable[[float], float] = float) -> Metric:
    """`scale` (monotone) of sum(sums) / sum(sizes), for items of unlike size, by the delta method."""
    n, total = len(sums), sum(sizes)
    middle = sum(sums) / total
    if n < 2:
        return Metric(scale(middle), n=n)
    spread = sum((value - middle * size) ** 2 for value, size in zip(sums, sizes, strict=True))
    return _student(scale, middle, math.sqrt(spread * n / (n - 1)) / total, n)


def median(values: Sequence[float], scale: Callable[[float], float] = float) -> Metric:
    """`scale` (monotone) of the median, bounded by order statistics.

    This interval of the sign test covers at least 95 % for any distribution; resampling few values does not.
    """
    n, middle = len(values), statistics.median(values)
    if n < MEDIAN_NEEDS:
        return Metric(scale(middle), n=n)
    interval = stats.quantile_test(values, q=middle).confidence_interval()
    return _bounded(scale, middle, float(interval.low), float(interval.high), n)


def width(metric: Metric) -> float:
    """Width of the interval as a fraction of the value; infinite without an interval."""
    if metric.low is None or metric.high is None:
        return math.inf
    return (metric.high - metric.low) / abs(metric.value)


def exp(nats: float) -> float:
    """e to the power of `nats`, infinite where a double cannot hold it."""
    return math.exp(nats) if nats < 709 else math.inf


def _student(scale: Callable[[float], float], middle: float, error: float, n: int) -> Metric:
    """Student's interval of a mean of `n` values with a standard error."""
    low, high = stats.t.interval(0.95, n - 1, middle, error) if error else (middle, middle)
    return _bounded(scale, middle, float(low), float(high), n)


def _bounded(scale: Callable[[float], float], middle: float, low: float, high: float, n: int) -> Metric:
    first, last = scale(low), scale(high)
    return Metric(scale(middle), min(first, last), max(first, last), n)
