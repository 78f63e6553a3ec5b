"""Intervals and tests for paired measurements.

Both sides of a comparison saw the same items (questions, windows of text), so everything here works on
differences per item: what the sides have in common cancels, and far fewer items show the same effect.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

FEWEST = 5  # a bootstrap of fewer items says nothing: no interval, p = 1
PAIR = 2  # the fewest values that have a spread
ENOUGH = 30  # values other than zero from which on Student's t is as good as a bootstrap
RESAMPLES = 9999
TINY = 1e-12  # a variance below which all is certain


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """A mean of `n` values, the bounds of its interval where there is one, and p of the mean being zero."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float = 1.0
    n: int = 1


def mean_interval(*strata: ArrayLike, level: float | None = 0.95, averages: bool = False, seed: int = 0) -> Estimate:
    """Mean of the strata's means with its interval and its p: by `student` where it holds, else by `bootstrap`.

    Give values of items for the interval of their mean, or paired differences to test whether two sides differ.
    Each stratum (a task among several) keeps its weight whatever its number of items. What decides is how many
    values are not zero: of 700 answers of which 4 changed, 4 are the sample. A bootstrap's p is at least
    1 / resamples, which no table of 500 tests would call significant, so it is used only where items are few.
    `averages` says that each value is a mean over many things itself, as that of a window is over its tokens: such
    means are near to normal, and `student` holds for few of them too.
    Without a level there is a p and no interval. The same values always give the same answer. Raises `ValueError` for
    an empty stratum.
    """
    groups = [np.asarray(values, dtype=np.float64) for values in strata]
    if not groups or min(map(len, groups)) == 0:
        raise ValueError("no values to take the mean of")
    if min(map(len, groups)) < (PAIR if averages else FEWEST):
        return Estimate(_mean_of_means(groups), n=sum(map(len, groups)))
    enough = averages or sum(np.count_nonzero(group) for group in groups) >= ENOUGH
    return student(groups, level) if enough else bootstrap(groups, level, seed=seed)


def student(strata: Sequence[Floats], level: float | None = 0.95) -> Estimate:
    """Student's t for one stratum; for several the degrees of freedom of Welch and Satterthwaite.

    Strata have two values or more each.
    """
    from scipy.special import stdtr, stdtrit

    value, n = _mean_of_means(strata), sum(map(len, strata))
    squares = [_squared_error(group) for group in strata]
    error = math.sqrt(sum(squares)) / len(strata)
    if _vanishes(error, value):
        return _without_spread(value, n)
    freedom = sum(squares) ** 2 / sum(
        square**2 / (len(group) - 1) for square, group in zip(squares, strata, strict=True)
    )
    p = float(2 * stdtr(freedom, -abs(value) / error))
    if level is None:
        return Estimate(value, p=p, n=n)
    reach = float(stdtrit(freedom, (1 + level) / 2)) * error
    return Estimate(value, value - reach, value + reach, p, n)


def bootstrap(
    strata: Sequence[Floats], level: float | None = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Symmetric studentized bootstrap; items are resampled within their stratum.

    Studentized, because the percentile bootstrap calls equal sides different too often below about 50 items.
    """
    value, n = _mean_of_means(strata), sum(map(len, strata))
    error = math.sqrt(sum(map(_squared_error, strata))) / len(strata)
    if _vanishes(error, value):
        return _without_spread(value, n)
    means, variances = np.zeros(resamples), np.zeros(resamples)
    for index, group in enumerate(strata):
        if not group.any():
            continue  # all samples of zeros are alike
        mean, variance = _resample(group, resamples, (seed, index))
        means += mean / len(strata)
        variances += variance / len(strata) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(means - value) / np.sqrt(variances)
    t[np.isnan(t)] = 0  # 0 / 0: a resample without spread that hit the mean
    p = float((1 + np.count_nonzero(t >= abs(value) / error)) / (resamples + 1))
    if level is None:
        return Estimate(value, p=p, n=n)
    reach = float(np.quantile(t, level, method="higher")) * error
    if math.isfinite(reach):
        return Estimate(value, value - reach, value + reach, p, n)
    # So few items differ that many resamples have no spread at all: their means still bound the mean.
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), p, n)


def _mean_of_means(strata: Sequence[Floats]) -> float:
    return math.fsum(float(group.mean()) for group in strata) / len(strata)


def _squared_error(group: Floats) -> float:
    """Squared standard error of a stratum's mean."""
    deviations = group - group.mean()
    return float(deviations @ deviations) / (len(group) - 1) / len(group)


def _vanishes(error: float, value: float) -> bool:
    return error <= 1e-12 * max(1.0, abs(value))


def _without_spread(value: float, n: int) -> Estimate:
    """All values are the same, which says nothing of how far the next may be: no interval. Were the sides equal, n
    differences would all share a sign this often."""
    return Estimate(value, p=1.0 if value == 0 else 2.0 ** (1 - n), n=n)


def _resample(group: Floats, resamples: int, seed: tuple[int, int]) -> tuple[Floats, Floats]:
    """Means of bootstrap samples and the variances of those means, [resamples] each."""
    n, values = len(group), group[group != 0]
    counts = _counts(n, len(values), resamples, seed)
    means, squares = values @ counts / n, values**2 @ counts / n
    variances = (squares - means**2) / (n - 1)
    variances[variances < 1e-14 * squares] = 0  # what rounding leaves of samples that are all the same
    return means, variances


@functools.lru_cache(maxsize=128)
def _counts(n: int, k: int, resamples: int, seed: tuple[int, int]) -> Floats:
    """How often each of the first `k` of `n` items is in a bootstrap sample, [k, resamples].

    Zeros add nothing to a sum, so only the other items have to be counted; which they are makes no difference.
    """
    rng = np.random.default_rng(seed)
    chances = [1 / n] * k + [1 - k / n]
    return np.ascontiguousarray(rng.multinomial(n, chances, size=resamples)[:, :k].T, dtype=np.float64)


@functools.lru_cache(maxsize=65536)
def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p of McNemar's test: equal sides lose as many right answers as they gain."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def answers_interval(changes: Sequence[tuple[int, int, int]], level: float = 0.95) -> tuple[float, float]:
    """Bounds of the mean over tasks of (gained - lost) / items, by `score_interval` of each task, joined by the squares
    of their reaches (MOVER). `changes` are (lost, gained, items) of each task. Answers that are all alike do not make
    it a point: so many items could hide a difference.

    Source: Donner and Zou, Statistics in Medicine 2012, for the joining. Raises `ValueError` for no task.
    """
    if not changes:
        raise ValueError("no tasks")
    value, below, above = 0.0, 0.0, 0.0
    for lost, gained, n in changes:
        low, high = score_interval(lost, gained, n, level)
        difference = (gained - lost) / n
        value += difference / len(changes)
        below += ((difference - low) / len(changes)) ** 2
        above += ((high - difference) / len(changes)) ** 2
    return max(-1.0, value - math.sqrt(below)), min(1.0, value + math.sqrt(above))


@functools.lru_cache(maxsize=65536)
def score_interval(lost: int, gained: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Bounds of the difference of two shares of right answers to the same `n` questions: those for which the score
    test of the paired answers does not reject the difference.

    Source: Tango, Statistics in Medicine 1998, eq. 6-8. Raises `ValueError` where there are no questions.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    if n < 1:
        raise ValueError("no questions")
    reach, value = float(ndtri((1 + level) / 2)), (gained - lost) / n

    def exceed(difference: float) -> float:
        """The statistic at a difference; it falls as that grows."""
        linear = (2 * n - gained + lost) * difference - gained - lost
        root = math.sqrt(max(0.0, linear**2 + 8 * n * lost * difference * (1 - difference)))
        nuisance = (root - linear) / (4 * n)  # the likeliest share of lost answers, were this the difference
        variance = n * (2 * nuisance + difference * (1 - difference))
        distance = gained - lost - n * difference
        return distance / math.sqrt(max(variance, TINY)) if distance else 0.0

    edge = 1 - 1e-12
    low = -1.0 if exceed(-edge) < reach else float(brentq(lambda d: exceed(d) - reach, -edge, value))
    high = 1.0 if exceed(edge) > -reach else float(brentq(lambda d: exceed(d) + reach, value, edge))
    return low, high


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
    from scipy.special import stdtrit

    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    reach = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return Estimate(mean, mean - reach, mean + reach, n=len(values))
