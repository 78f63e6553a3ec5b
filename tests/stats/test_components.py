"""Components of variance: planted ones are found, and what they foretell is what more items and seeds do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.stats.components import Components, split_variance


def draw(rng, runs, sizes, items, seeds, both):
    """Values [seeds, items] of tasks that share what a seed does."""
    of_seed = rng.normal(0, seeds**0.5, (runs, 1))
    return [of_seed + rng.normal(0, items**0.5, (1, n)) + rng.normal(0, both**0.5, (runs, n)) for n in sizes]


@pytest.mark.parametrize("planted", [(1.0, 0.04, 0.25), (0.1, 0.5, 0.2), (2.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_planted_components_are_found(planted):
    rng = np.random.default_rng(5)
    spreads = [split_variance(draw(rng, 6, [80], *planted)) for _ in range(300)]
    found = np.mean([(spread.items, spread.seeds, spread.both) for spread in spreads], axis=0)
    assert found == pytest.approx(planted, rel=0.2, abs=0.02)


def test_the_variance_of_a_mean_over_tasks_is_foretold():
    """Of unlike tasks, at twice the items and at three times the seeds, against draws of that size."""
    rng, planted = np.random.default_rng(6), (1.0, 0.1, 0.5)
    spreads = [split_variance(draw(rng, 4, [20, 60], *planted)) for _ in range(400)]
    for items, seeds in ((1, 1), (2, 1), (1, 3)):
        sizes = [20 * items, 60 * items]
        means = [np.mean([task.mean() for task in draw(rng, 4 * seeds, sizes, *planted)]) for _ in range(4000)]
        foretold = np.mean([spread.foretell(items, seeds) for spread in spreads])
        assert foretold == pytest.approx(np.var(means), rel=0.1)


def test_a_difference_as_large_as_the_detectable_one_is_seen_in_four_of_five():
    rng, spread = np.random.default_rng(7), Components(1.0, 0.0, 0.0, 100, 1)
    seen = [abs(rng.normal(spread.detectable, 1, 100).mean()) > 1.96 * 0.1 for _ in range(4000)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(2, 30), min_size=1, max_size=3), st.integers(0, 1000))
def test_more_never_widens(runs, sizes, seed):
    spread = split_variance(draw(np.random.default_rng(seed), runs, sizes, 1.0, 0.2, 0.5))
    assert spread.runs == runs and min(sizes) <= spread.n <= max(sizes)
    assert min(spread.items, spread.seeds, spread.both) >= 0 and 0 <= spread.from_seeds <= 1
    assert 0 <= spread.narrow(seeds=2) <= 1 - 0.5**0.5 + 1e-9 and 0 <= spread.narrow(items=2) <= 1 - 0.5**0.5 + 1e-9


def test_degenerate_samples():
    assert split_variance([np.ones((3, 1))]) is None
    alike = split_variance([np.ones((3, 4))])
    assert (
        alike == Components(0.0, 0.0, 0.0, 4.0, 3) and alike.detectable == alike.from_seeds == alike.narrow(2, 2) == 0
    )
    single = split_variance([np.array([[1.0, 2.0, 3.0]])])
    assert single.items == pytest.approx(1.0) and single.seeds == single.both == 0
    for wrong in ([], [np.ones((2, 3)), np.ones((3, 3))]):
        with pytest.raises(ValueError, match="same seeds"):
            split_variance(wrong)
