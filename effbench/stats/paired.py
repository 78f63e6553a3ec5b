"""Intervals and tests for paired measurements.

Both sides of a comparison saw the same items (questions, windows of text), so everything here works on
differences per item: what the sides have in common cancels, and far fewer items show the same effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

FEWEST = 5  # a bootstrap of fewer items says nothing: no interval, p = 1
CHUNK = 2_000_000  # resampled values held at a time


@dataclass(frozen=True)
class Estimate:
    """A mean of `n` values, the bounds of its interval where there is one, and p of the mean being zero."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float = 1.0
    n: int = 1


def mean_interval(*strata: ArrayLike, level: float = 0.95, resamples: int = 9999, seed: int = 0) -> Estimate:
    """Mean of the strata's means, with a symmetric studentized bootstrap interval and the p that fits it.

    Give values of items for the interval of their mean, or paired differences to test whether two sides
    differ. Items are resampled within their stratum (a task among several), so each stratum keeps its weight.
    Studentized, because the percentile bootstrap calls equal sides different too often below about 50 items.
    The same values always give the same answer. Raises `ValueError` for an empty stratum.
    """
    groups = [np.asarray(values, dtype=np.float64) for values in strata]
    if not groups or min(len(group) for group in groups) == 0:
        raise ValueError("no values to resample")
    n = sum(len(group) for group in groups)
    value = float(np.mean([group.mean() for group in groups]))
    if min(len(group) for group in groups) < FEWEST:
        return Estimate(value, n=n)
    error = math.sqrt(sum(group.var(ddof=1) / len(group) for group in groups)) / len(groups)
    if error <= 1e-12 * max(1.0, abs(value)):
        # No spread to resample. Were the sides equal, n differences would all share a sign this often.
        return Estimate(value, value, value, 1.0 if value == 0 else 2.0 ** (1 - n), n)

    rng = np.random.default_rng(seed)
    means, variances = np.zeros(resamples), np.zeros(resamples)
    for group in groups:
        mean, variance = _resampled(group, resamples, rng)
        means += mean / len(groups)
        variances += variance / len(groups) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(means - value) / np.sqrt(variances)
    t = np.nan_to_num(t, nan=0.0, posinf=math.inf)  # 0 / 0: a resample without spread that hit the mean
    p = float((1 + np.sum(t >= abs(value) / error)) / (resamples + 1))
    reach = float(np.quantile(t, level, method="higher")) * error
    if math.isfinite(reach):
        return Estimate(value, value - reach, value + reach, p, n)
    # So few items differ that many resamples have no spread at all: their means still bound the mean.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), p, n)


def _resampled(group: Floats, resamples: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Means of bootstrap samples and the variances of those means, [resamples] each."""
    means, variances = np.empty(resamples), np.empty(resamples)
    n = len(group)
    step = max(1, CHUNK // n)
    for start in range(0, resamples, step):
        sample = group[rng.integers(0, n, size=(min(step, resamples - start), n))]
        means[start : start + step] = sample.mean(axis=1)
        variances[start : start + step] = sample.var(axis=1, ddof=1) / n
    return means, variances


def mcnemar(before: ArrayLike, after: ArrayLike) -> float:
    """Exact two-sided p of McNemar's test: equal sides lose as many right answers as they gain.

    Raises `ValueError` when the two sides do not have the same number of items.
    """
    from scipy.stats import binomtest  # slow to import

    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} items cannot be paired with {second.size}")
    lost, gained = int(np.sum(first & ~second)), int(np.sum(~first & second))
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: calling those below 0.05 risks a false alarm at 5 %."""
    adjusted = [0.0] * len(p)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = highest
    return adjusted


def over_seeds(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean over seeds: with Student's interval from three seeds on, with the range for two, alone for one.

    Raises `ValueError` when there is no value.
    """
    if not values:
        raise ValueError("no seeds")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean)
    if len(values) == 2:
        return Estimate(mean, min(values), max(values), n=2)
    from scipy.stats import t

    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = float(t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Estimate(mean, mean - reach, mean + reach, n=len(values))
