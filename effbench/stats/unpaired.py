"""Intervals and tests for measurements that have no partner: timings of two processes, numbers of two sets of seeds."""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike

from effbench.stats.paired import Estimate

TRIM = 0.2  # of the values at each end, which a neighbour's work or a first call may have spoiled


def compare_means(before: ArrayLike, after: ArrayLike, level: float = 0.95) -> Estimate:
    """What the trimmed mean of `after` [m] is above that of `before` [n], by Yuen's test (Biometrika 61, 1974).

    It is Welch's t of what is left without a fifth at each end, so unlike spreads and a few spoiled values cost
    little. A side of one value has no spread: no interval then, and p = 1. Nor is there one of sides whose values are
    all alike; where these differ, p is that of their being so by chance of order. Raises `ValueError` for an empty
    side.
    """
    from scipy import stats

    left, right = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if not left.size or not right.size:
        raise ValueError("no values to compare")
    n = left.size + right.size
    value = trimmed_mean(right) - trimmed_mean(left)
    if min(left.size, right.size) < 2:
        return Estimate(value, n=n)
    spread = max(float(np.ptp(left)), float(np.ptp(right)))
    if spread <= 1e-12 * max(1.0, abs(value)):
        return Estimate(value, p=1.0 if value == 0 else min(1.0, 2 / math.comb(n, left.size)), n=n)
    with warnings.catch_warnings():  # of values of which nearly all are the same: they have the spread that they have
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.ttest_ind(right, left, equal_var=False, trim=TRIM)
    if not math.isfinite(found.pvalue):  # what is left of both sides is all the same
        return Estimate(value, n=n)
    bounds = found.confidence_interval(level)
    return Estimate(value, float(bounds.low), float(bounds.high), float(found.pvalue), n)


def trimmed_mean(values: ArrayLike) -> float:
    """The mean without a fifth of the values at each end."""
    from scipy import stats

    return float(stats.trim_mean(np.asarray(values, dtype=np.float64), TRIM))


def compare_intervals(before: Estimate, after: Estimate, level: float = 0.95) -> Estimate | None:
    """What `after` is above `before`, by the 95 % interval that each has of its own, taken as normal and independent.

    None where one of them has no interval.
    """
    from scipy.stats import norm

    if before.low is None or before.high is None or after.low is None or after.high is None:
        return None
    reach = float(norm.ppf(0.975))
    error = math.hypot(after.high - after.low, before.high - before.low) / (2 * reach)
    value = after.value - before.value
    if error == 0:
        return Estimate(value, n=before.n + after.n)
    half = float(norm.ppf((1 + level) / 2)) * error
    p = float(2 * norm.sf(abs(value) / error))
    return Estimate(value, value - half, value + half, p, before.n + after.n)
