"""95 % intervals for the kinds of number that probes take. Where nothing can be said, bounds are absent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from scipy.special import bdtr, stdtrit

from effbench.records.metric import Metric

Z = 1.959964  # normal quantile of 97.5 %
MEDIAN_NEEDS = 6  # fewest values whose range covers the median with 95 %


def fraction(hits: Sequence[float]) -> Metric:
    """Share of ones among zeros and ones, Wilson's interval."""
    n = len(hits)
    share = sum(hits) / n
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    reach = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return Metric(share, max(0.0, middle - reach), min(1.0, middle + reach), n)


def mean(values: Sequence[float], scale: Callable[[float], float] = float) -> Metric:
    """`scale` (monotone) of the mean and of its Student-t bounds, taking the values as independent."""
    n, middle = len(values), statistics.fmean(values)
    if n < 2:
        return Metric(scale(middle), n=n)
    reach = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return _bounded(scale, middle, middle - reach, middle + reach, n)


def quotient(sums: Sequence[float], sizes: Sequence[float], scale: Callable[[float], float] = float) -> Metric:
    """`scale` (monotone) of sum(sums) / sum(sizes), for items of unlike size, by the delta method."""
    n, total = len(sums), sum(sizes)
    middle = sum(sums) / total
    if n < 2:
        return Metric(scale(middle), n=n)
    spread = sum((value - middle * size) ** 2 for value, size in zip(sums, sizes, strict=True))
    reach = float(stdtrit(n - 1, 0.975)) * math.sqrt(spread * n / (n - 1)) / total
    return _bounded(scale, middle, middle - reach, middle + reach, n)


def median(values: Sequence[float], scale: Callable[[float], float] = float) -> Metric:
    """`scale` (monotone) of the median, bounded by order statistics.

    This interval of the sign test covers at least 95 % for any distribution; resampling few values does not.
    """
    ordered, n = sorted(values), len(values)
    middle = statistics.median(ordered)
    if n < MEDIAN_NEEDS:
        return Metric(scale(middle), n=n)
    outside = 0
    while 2 * bdtr(outside, n, 0.5) <= 0.05:
        outside += 1
    return _bounded(scale, middle, ordered[outside - 1], ordered[n - outside], n)


def width(metric: Metric) -> float:
    """Width of the interval as a fraction of the value; infinite without an interval."""
    if metric.low is None or metric.high is None:
        return math.inf
    return (metric.high - metric.low) / abs(metric.value)


def exp(nats: float) -> float:
    """e to the power of `nats`, infinite where a double cannot hold it."""
    return math.exp(nats) if nats < 709 else math.inf


def _bounded(scale: Callable[[float], float], middle: float, low: float, high: float, n: int) -> Metric:
    first, last = scale(low), scale(high)
    return Metric(scale(middle), min(first, last), max(first, last), n)
