"""Intervals and tests against closed forms, scipy, and the rate of false alarms between equal sides."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from effbench.stats.paired import (
    Estimate,
    answers_interval,
    bootstrap,
    holm,
    mcnemar,
    mean_interval,
    over_seeds,
    score_interval,
    student,
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("n", [12, 60, 400])
def test_bootstrap_agrees_with_student_on_normal_values(rng, n):
    values = rng.normal(0.4, 1.0, n)
    found = bootstrap([values])
    student = scipy_stats.ttest_1samp(values, 0)
    low, high = student.confidence_interval()
    assert found.value == pytest.approx(values.mean())
    assert found.n == n
    # the bootstrap's tails are those of the sample, so few values only agree roughly
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12 * (high - low))
    assert found.p == pytest.approx(student.pvalue, abs=0.03)


@pytest.mark.parametrize("draw", ["normal", "heavy", "discrete"])
@pytest.mark.parametrize("n", [20, 100])
def test_equal_sides_are_called_different_at_most_six_times_in_a_hundred(rng, draw, n):
    alarms = 0
    for _ in range(600):
        if draw == "discrete":
            differences = rng.choice([-1.0, 0.0, 1.0], size=n, p=[0.15, 0.7, 0.15])
        elif draw == "heavy":
            differences = rng.standard_t(3, n)
        else:
            differences = rng.normal(size=n) - rng.normal(size=n)
        alarms += mean_interval(differences).p <= 0.05
    assert alarms / 600 <= 0.06


@pytest.mark.parametrize("n", [2, 7, 30, 500])
def test_student_is_that_of_scipy(rng, n):
    values = rng.normal(0.1, 1.0, n)
    estimate, theirs = student([values]), scipy_stats.ttest_1samp(values, 0)
    assert estimate.p == pytest.approx(theirs.pvalue)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(theirs.confidence_interval()))


def test_student_of_two_strata_is_that_of_welch(rng):
    """The mean of two strata is half the difference between one and the other with its sign changed."""
    first, second = rng.normal(0.2, 1.0, 40), rng.normal(0.1, 3.0, 60)
    estimate, theirs = student([first, second]), scipy_stats.ttest_ind(first, -second, equal_var=False)
    assert estimate.p == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval()
    assert (estimate.low, estimate.high) == pytest.approx((low / 2, high / 2))


@pytest.mark.parametrize("changed", [6, 12, 25])
def test_bootstrap_counts_only_the_items_that_are_not_zero(rng, changed):
    """The same answer as drawing all items."""
    values = np.zeros(200)
    values[:changed] = rng.choice([-1.0, 1.0, 1.0], changed)
    estimate = bootstrap([values])
    draws = values[rng.integers(0, 200, (9999, 200))]
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(draws.mean(axis=1) - values.mean()) / (draws.std(axis=1, ddof=1) / math.sqrt(200))
    error = values.std(ddof=1) / math.sqrt(200)
    p = np.mean(np.nan_to_num(t, nan=0.0, posinf=math.inf) >= abs(values.mean()) / error)
    assert estimate.p == pytest.approx(p, abs=0.02)


def test_a_plain_difference_survives_thousands_of_tests(rng):
    """No p is bound by a number of resamples where the items are enough."""
    clear = mean_interval(rng.normal(1.0, 0.5, 64))
    tasks = mean_interval(*(rng.choice([0.0, -1.0], 100, p=[0.8, 0.2]) for _ in range(7)))
    assert max(holm([clear.p, tasks.p, *[1.0] * 100_000])[:2]) < 0.001


values = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=3))
def test_exchanging_the_sides_changes_the_sign_and_nothing_else(strata):
    there, back = mean_interval(*strata), mean_interval(*([-value for value in stratum] for stratum in strata))
    assert back.value == -there.value and back.p == there.p and back.n == there.n
    if there.low is None or there.high is None:
        assert back.low is back.high is None
    else:
        assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-12)


def test_mcnemar_false_alarm_rate(rng):
    def compare(before, after):
        return mcnemar(int(np.sum(before & ~after)), int(np.sum(~before & after)))

    alarms = sum(compare(rng.random(80) < 0.5, rng.random(80) < 0.5) <= 0.05 for _ in range(1000))
    assert alarms / 1000 <= 0.06


def score(lost, gained, n, difference):
    """The score statistic at a difference, the likeliest share of lost answers found on a fine grid."""
    shares = np.linspace(max(0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9, 100_001)
    weights = ((lost, shares), (gained, shares + difference), (n - lost - gained, 1 - 2 * shares - difference))
    likelihood = sum(count * np.log(share) for count, share in weights if count)
    share = shares[np.argmax(likelihood)]
    return (gained - lost - n * difference) / math.sqrt(n * (2 * share + difference - difference**2))


@pytest.mark.parametrize("lost, gained, n", [(2, 12, 50), (1, 0, 30), (4, 4, 10), (10, 0, 40), (30, 45, 200)])
def test_the_score_interval_holds_what_the_test_does_not_reject(lost, gained, n):
    low, high = score_interval(lost, gained, n)
    assert score(lost, gained, n, low) == pytest.approx(1.96, abs=1e-3)
    assert score(lost, gained, n, high) == pytest.approx(-1.96, abs=1e-3)


counts = st.integers(1, 60).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda lost: st.tuples(st.just(lost), st.integers(0, n - lost), st.just(n)))
)


@settings(max_examples=200, deadline=None)
@given(counts)
def test_a_score_interval_is_never_a_point_and_turns_with_the_sides(case):
    lost, gained, n = case
    low, high = score_interval(lost, gained, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1 and high - low > 1 / (10 * n)
    assert score_interval(gained, lost, n) == pytest.approx((-high, -low), abs=1e-9)
    assert answers_interval([case]) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize("n, lost, gained", [(40, 0.1, 0.1), (100, 0.05, 0.15), (60, 0.0, 0.1), (20, 0.3, 0.1)])
def test_intervals_of_answers_hold_the_truth(rng, n, lost, gained):
    """Of one task, and of the mean over three tasks of unlike size."""
    single, joined = 0, 0
    for _ in range(800):
        first, *_ = rows = [
            (*map(int, rng.multinomial(size, [lost, gained, 1 - lost - gained])[:2]), size)
            for size in (n, 2 * n, 3 * n)
        ]
        (low, high), (least, most) = answers_interval([first]), answers_interval(rows)
        single += low <= gained - lost <= high
        joined += least <= gained - lost <= most
    assert min(single, joined) / 800 >= 0.93


def test_nothing_changed_is_no_proof_of_equality():
    low, high = answers_interval([(0, 0, 100)] * 4)
    assert low == pytest.approx(-high) and 0.01 < high < 0.05


def test_pairing_sees_what_unpaired_intervals_cannot(rng):
    hard = rng.normal(2.0, 1.0, 200)  # how hard each window is, for both sides
    before, after = hard + rng.normal(0, 0.02, 200), hard + 0.02 + rng.normal(0, 0.02, 200)
    assert mean_interval(after - before).p < 0.001
    assert mean_interval(before).high > mean_interval(after).low


def test_p_below_the_level_exactly_when_the_interval_excludes_zero(rng):
    for shift in np.linspace(0, 0.5, 30):
        found = bootstrap([rng.normal(shift, 1, 50)], resamples=999)
        if abs(found.p - 0.05) > 0.003:
            assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_strata_weigh_alike_whatever_their_size(rng):
    found = mean_interval(np.zeros(1000) + rng.normal(0, 0.01, 1000), np.ones(10) + rng.normal(0, 0.01, 10))
    assert found.value == pytest.approx(0.5, abs=0.01)
    assert found.low < found.value < found.high


def test_same_values_same_answer(rng):
    values = rng.normal(size=40)
    assert mean_interval(values) == mean_interval(list(values))


def test_few_differing_items_still_have_a_finite_interval():
    found = mean_interval([1.0, -1.0, 1.0] + [0.0] * 97)
    assert found.p > 0.1
    assert math.isfinite(found.low) and math.isfinite(found.high)
    assert found.low <= found.value <= found.high


def test_degenerate_differences():
    assert mean_interval(np.zeros(50)) == Estimate(0.0, n=50)
    assert mean_interval(np.full(20, 0.25)).p == pytest.approx(2 * 0.5**20)
    assert mean_interval([1.0, 2.0, 1.5]) == Estimate(1.5, None, None, 1.0, 3)
    assert mean_interval([1.0], averages=True) == Estimate(1.0, None, None, 1.0, 1)
    assert mean_interval([1.0, 2.0], [1.0], averages=True) == Estimate(1.25, None, None, 1.0, 3)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
    with pytest.raises(ValueError, match="no values"):
        mean_interval()


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 9), (20, 20), (0, 12)])
def test_mcnemar_is_the_exact_binomial(lost, gained):
    tail = sum(math.comb(lost + gained, k) for k in range(min(lost, gained) + 1)) / 2 ** (lost + gained)
    assert mcnemar(lost, gained) == mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(lost, gained) == pytest.approx(
        scipy_stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    )


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_family_wise_rate(rng):
    families = sum(min(holm(list(rng.random(20)))) <= 0.05 for _ in range(2000))
    assert families / 2000 <= 0.065


def test_over_seeds():
    assert over_seeds([2.0]) == Estimate(2.0)
    assert over_seeds([1.0, 3.0]) == Estimate(2.0, 1.0, 3.0, n=2)
    found = over_seeds([1.0, 2.0, 6.0])
    low, high = scipy_stats.ttest_1samp([1.0, 2.0, 6.0], 0).confidence_interval()
    assert (found.value, found.low, found.high) == pytest.approx((3.0, low, high))
    with pytest.raises(ValueError, match="no seeds"):
        over_seeds([])


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_averages_are_tested_by_student_however_few_they_are(rng, n):
    values = rng.normal(1.0, 0.5, n)
    found, known = mean_interval(values, averages=True), scipy_stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(known.pvalue) and found.n == n
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()))


@pytest.mark.parametrize("n", [2, 4])
def test_few_averages_of_equal_sides_raise_no_more_false_alarms(rng, n):
    alarms = sum(mean_interval(rng.normal(0, 1, n), averages=True).p <= 0.05 for _ in range(2000))
    assert 60 <= alarms <= 140
