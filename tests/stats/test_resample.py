"""Draws of deviations against the standard errors and the Student's distributions that they stand for."""

import math

import numpy as np
import pytest
from scipy import stats

from effbench.stats.resample import draw_within, has_spread, resample_items, resample_rounds, reweigh_seeds

DRAWS = 20_000


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("items", [8, 60])
def test_means_of_items_are_student_s(rng, items):
    values = rng.normal(2.0, 1.5, (1, items))
    drawn = resample_items(values, rng, DRAWS)[:, 0]
    error = values.std(ddof=1) / math.sqrt(items)
    for share in (0.05, 0.5, 0.95):
        assert np.quantile(drawn, share) == pytest.approx(error * stats.t.ppf(share, items - 1), abs=0.12 * error)


def test_rows_share_their_items(rng):
    values = rng.normal(size=40)
    drawn = resample_items(np.stack([values, values, -values, values + 7]), rng, 500)
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert drawn[:, 3] == pytest.approx(drawn[:, 0])
    assert drawn[:, 2] == pytest.approx(-drawn[:, 0])


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_means_of_seeds_are_student_s(rng, seeds):
    values = rng.normal(size=seeds)
    drawn = reweigh_seeds(values, rng, DRAWS)
    error = values.std(ddof=1) / math.sqrt(seeds)
    assert stats.kstest(drawn / error, stats.t(seeds - 1).cdf).statistic < 0.015


def test_seeds_that_agree_have_no_noise(rng):
    assert not reweigh_seeds(np.array([0.3, 0.3, 0.3]), rng, 50).any()


def test_few_rounds_are_student_s_and_many_those_of_their_median(rng):
    few = np.array([0.0, 0.2, 0.1])
    error = few.std(ddof=1) / math.sqrt(3)
    assert stats.kstest(resample_rounds(few, rng, DRAWS) / error, stats.t(2).cdf).statistic < 0.015
    many = rng.normal(size=201)
    expected = math.sqrt(math.pi / 2) * many.std(ddof=1) / math.sqrt(201)  # of the median of normal values
    assert resample_rounds(many, rng, 4000).std() == pytest.approx(expected, rel=0.25)


def test_an_interval_is_drawn_back(rng):
    drawn = 4.0 + draw_within(3.0, 4.0, 7.0, rng, DRAWS)
    assert np.quantile(drawn, [0.025, 0.5, 0.975]) == pytest.approx([3.0, 4.0, 7.0], abs=0.08)


def test_one_value_has_no_spread():
    assert not has_spread(np.zeros((3, 1))) and has_spread(np.zeros((3, 2)))
