"""Fronts of Pareto: the front itself by its definition, and what is said of rows on simulated truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.stats.pareto import LEVEL, ROBUST, find_front, judge_rows
from effbench.stats.resample import resample_items, reweigh_seeds


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def front_by_definition(points):
    """Indices of points [rows][aims] that no other point is nowhere worse and somewhere better than."""
    return [
        at
        for at, own in enumerate(points)
        if not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and any(a < b for a, b in zip(other, own, strict=True))
            for other in points
        )
    ]


points = st.integers(1, 3).flatmap(
    lambda aims: st.lists(st.lists(st.integers(0, 3), min_size=aims, max_size=aims), min_size=1, max_size=8)
)


@settings(deadline=None)
@given(points)
def test_the_front_is_what_nothing_dominates(rows):
    found = find_front(np.array(rows, dtype=float).T)
    assert np.flatnonzero(found).tolist() == front_by_definition(rows)


def test_what_is_known_exactly_is_certain():
    values = np.array([[1.0, 2.0, 2.0, 3.0], [3.0, 2.0, 2.0, 2.5]])
    draws = np.repeat(values[:, None], 50, axis=1)
    members = judge_rows(values, draws)
    assert [member.status for member in members] == ["robust", "robust", "robust", "excluded"]
    assert [member.probability for member in members] == [1, 1, 1, 0]


def test_the_order_of_rows_and_a_monotone_scale_change_nothing(rng):
    values = rng.normal(size=(2, 7))
    draws = values[:, None] + rng.normal(0, 0.4, (2, 500, 7))
    members, order = judge_rows(values, draws), rng.permutation(7)
    assert judge_rows(values[:, order], draws[:, :, order]) == [members[at] for at in order]
    shifted = judge_rows(3 * values + 1, 3 * draws + 1)
    assert [member.status for member in shifted] == [member.status for member in members]


def test_a_common_shift_of_all_rows_is_no_doubt(rng):
    """Items that are hard for all rows move all of them: paired, nothing changes."""
    values = np.array([[0.0, 0.1, 0.2], [3.0, 2.0, 2.5]])
    draws = values[:, None] + np.stack([np.repeat(rng.normal(0, 5, (400, 1)), 3, axis=1), np.zeros((400, 3))])
    assert [member.status for member in judge_rows(values, draws)] == ["robust", "robust", "excluded"]
    apart = values[:, None] + np.stack([rng.normal(0, 5, (400, 3)), np.zeros((400, 3))])
    assert "excluded" not in {member.status for member in judge_rows(values, apart)}


def simulate(rng, rows, items, seeds, spread, draws=399):
    """A table of rows with known quality and cost: which are on the true front, and what is said of them."""
    quality, cost = rng.normal(0, spread, rows), rng.permutation(rows).astype(float)
    scores = quality[:, None, None] + rng.normal(size=items) + rng.normal(0, 0.5, (rows, 1, items))
    if seeds > 1:
        scores = scores + rng.normal(0, 0.1, (rows, seeds, 1))
    means = scores.mean(axis=1)
    deviations = resample_items(means, rng, draws)
    if seeds > 1:
        deviations += np.stack([reweigh_seeds(row.mean(axis=1), rng, draws) for row in scores], axis=-1)
    values = np.stack([means.mean(axis=1), cost])
    drawn = np.repeat(values[:, None], draws, axis=1)
    drawn[0] += deviations
    return find_front(np.stack([quality, cost])), judge_rows(values, drawn)


@pytest.mark.parametrize(
    ("rows", "items", "seeds", "spread"),
    [(12, 24, 1, 0.3), (12, 24, 1, 0.001), (12, 100, 3, 0.1), (8, 30, 2, 0.1), (20, 60, 1, 0.05)],
)
def test_rows_of_the_true_front_are_kept_and_robust_ones_belong_to_it(rng, rows, items, seeds, spread):
    """Nominal 95 % covers 90 % at least: of rows on the true front that are not excluded, also where all are nearly
    equal, and of rows whose probability is 95 % that are on it.
    """
    kept, likely, robust = [], [], []
    for _ in range(120):
        truth, members = simulate(rng, rows, items, seeds, spread)
        kept += [not member.excluded for member, on in zip(members, truth, strict=True) if on]
        likely += [on for member, on in zip(members, truth, strict=True) if member.probability >= 1 - LEVEL]
        robust += [on for member, on in zip(members, truth, strict=True) if member.probability >= ROBUST]
    assert np.mean(kept) >= 0.9
    assert len(likely) >= 100 and np.mean(likely) >= 0.9
    assert np.mean(robust) >= 0.85


def test_many_items_exclude_what_is_dominated(rng):
    truth, members = simulate(rng, 12, 20_000, 1, 0.3, draws=199)
    excluded = np.array([member.excluded for member in members])
    assert not excluded[truth].any() and excluded[~truth].mean() > 0.8
    assert [member.drawn for member in members] == truth.tolist()


def test_equal_rows_share_the_front_and_none_is_excluded(rng):
    """Ten rows of one quality: each draw has another one on the front, which is no reason to leave any out."""
    members = [member for _ in range(40) for member in simulate(rng, 10, 50, 1, 0.0)[1]]
    assert np.mean([member.excluded for member in members]) < 0.2
    assert np.mean([member.probability for member in members]) < 0.5
