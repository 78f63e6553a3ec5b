"""What values could have come out as, had items, seeds or rounds of timing been others: draws of their deviations.

All values are taken on the scale on which their noise is symmetrical. A few values resampled spread less than they
should, by the degree of freedom that their mean takes; draws are stretched by that, and by the uncertainty of the
spread itself, so that of normal values they are Student's.
"""

from __future__ import annotations

import math

import numpy as np

from effbench.stats.paired import PAIR, Floats

Generator = np.random.Generator

DIGITS = 13  # of a deviation: what differs less is rounding, and rows with equal items stay equal


def resample_items(values: Floats, rng: Generator, draws: int) -> Floats:
    """Deviations of the means of rows, [draws, rows], when their common items are drawn anew; `values` are [rows,
    items], two items or more.
    """
    items = values.shape[1]
    counts = rng.multinomial(items, np.full(items, 1 / items), size=draws)
    deviations = counts @ (values - values.mean(axis=1, keepdims=True)).T / items
    stretched: Floats = np.round(deviations * _stretch(items, rng, draws)[:, None], DIGITS)
    return stretched


def reweigh_seeds(values: Floats, rng: Generator, draws: int) -> Floats:
    """Deviations, [draws], of the mean of two or more values of seeds, each of which is given a normal weight.

    Drawn with replacement two seeds would be the same one half of the time.
    """
    seeds = len(values)
    weights = rng.standard_normal((draws, seeds))
    spread = np.sqrt(rng.chisquare(seeds - 1, draws) / (seeds - 1))
    deviations: Floats = weights @ (values - values.mean()) / math.sqrt(seeds * (seeds - 1)) / spread
    return deviations


def resample_rounds(values: Floats, rng: Generator, draws: int) -> Floats:
    """Deviations, [draws], of the median of two or more rounds of timing.

    Of fewer than a median has an interval for, Student's of their mean.
    """
    from effbench.stats.intervals import MEDIAN_NEEDS

    rounds = len(values)
    if rounds < MEDIAN_NEEDS:
        error = values.std(ddof=1) / math.sqrt(rounds)
        return np.asarray(error * rng.standard_t(rounds - 1, draws), dtype=np.float64)
    drawn = np.median(rng.choice(values, (draws, rounds)), axis=1) - np.median(values)
    return np.asarray(drawn * _stretch(rounds, rng, draws), dtype=np.float64)


def draw_within(low: float, value: float, high: float, rng: Generator, draws: int) -> Floats:
    """Deviations, [draws], from a value of which nothing but a 95 % interval is known."""
    from effbench.stats.intervals import Z

    normal = rng.standard_normal(draws)
    return np.where(normal > 0, normal * (high - value) / Z, normal * (value - low) / Z)


def has_spread(values: Floats) -> bool:
    """Whether there are enough values to say how uncertain their mean is."""
    return len(values.T) >= PAIR


def _stretch(n: int, rng: Generator, draws: int) -> Floats:
    """By how much each draw of the mean of `n` values is stretched, [draws]."""
    factors: Floats = math.sqrt(n) / np.sqrt(rng.chisquare(n - 1, draws))
    return factors
