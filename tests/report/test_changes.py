"""Changes of speed, size and cost between two rows, and the words for them, on planted truth."""

import dataclasses
import math

import numpy as np
import pytest
from fake_records import make

from effbench.records.definitions import DEFINITIONS
from effbench.records.record import Metric
from effbench.report.changes import find_changes, is_counted
from effbench.report.compare import correct
from effbench.report.groups import Row
from effbench.report.verdicts import Effects, judge
from effbench.stats.paired import Estimate

HOST = {"machine": "acme-cpu-2core", "host": "h1"}
POINT = "b1_c128"


def timed(recipe="rtn()", *, faster=1.0, noise=0.03, rounds=12, seed=0, step=None, load=1.0, **changes):
    """A record whose decoding is so many times as fast as the unchanged model, both slowed by a load."""
    rng = np.random.default_rng(seed)
    drift = load * np.exp(rng.normal(0, 0.2, rounds))  # meets both alike
    theirs, ours = (drift * np.exp(rng.normal(0, noise, rounds)) * cost for cost in (1.0, 1 / faster))
    samples = {f"decode_seconds_{POINT}": ours.tolist(), f"decode_reference_seconds_{POINT}": theirs.tolist()}
    metrics = {f"decode_speedup_{POINT}": Metric(float(np.median(theirs / ours)))}
    metrics[f"decode_tok_per_s_{POINT}"] = Metric(float(1 / np.median(ours)))
    if step is not None:
        samples["fit_step_ms"] = (step * np.exp(rng.normal(0, noise, rounds))).tolist()
        metrics["fit_step_ms"] = Metric(float(np.median(samples["fit_step_ms"])))
    more = changes.pop("metrics", {})
    return make(recipe, samples=samples, metrics=metrics | more, environment=HOST, **changes)


def rows(*records):
    return [Row((record,)) for record in records]


DEFAULT = Effects()


def verdicts(before, after, effects=DEFAULT):
    found = find_changes(before, after).found
    adjusted = correct(found)
    return {one.metric: judge(one.metric, one.test, p, effects) for one, p in zip(found, adjusted, strict=True)}


def test_a_speed_up_is_compared_by_its_rounds():
    before, after = rows(timed(seed=1), timed(faster=1.3, seed=2, load=3.0))
    (change,) = find_changes(before, after).found  # and not the tokens per second, which the load changed
    assert change.metric == f"decode_speedup_{POINT}" and change.basis == "rounds"
    assert change.low < 1.3 < change.high and change.value == pytest.approx(1.3, rel=0.05)
    assert change.value == pytest.approx(math.exp(change.test.value))
    assert verdicts(before, after) == {change.metric: "faster"} and verdicts(after, before) == {change.metric: "slower"}


def test_a_difference_below_the_smallest_effect_is_none():
    before, after = rows(timed(seed=1, noise=1e-4), timed(faster=1.01, seed=2, noise=1e-4))
    (change,) = find_changes(before, after).found
    assert change.test.p < 1e-6
    assert verdicts(before, after)[change.metric] == "indistinguishable"
    assert verdicts(before, after, Effects(relative=0.5))[change.metric] == "faster"


def test_training_steps_are_compared_by_their_own_timings():
    before, after = rows(timed(seed=1, step=50.0), timed(seed=2, step=75.0))
    assert verdicts(before, after)["fit_step_ms"] == "slower"


def test_with_seeds_enough_the_seeds_are_the_sample():
    """A process may be slow as a whole: then its calls are no sample of what the next one takes."""
    rng = np.random.default_rng(3)

    def side(first):
        speeds = np.exp(rng.normal(0, 0.2, 3))
        return Row(tuple(timed(faster=one, noise=0.001, seed=first + k) for k, one in enumerate(speeds)))

    before, after = side(10), side(20)
    (change,) = find_changes(before, after).found
    assert change.basis == "records" and change.test.n == 6 and change.test.p > 0.05
    pair = [Row(one.records[:2]) for one in (before, after)]
    (change,) = find_changes(*pair).found
    assert change.basis == "rounds" and change.test.n == 48


@pytest.mark.parametrize(
    ("environment", "simulated"), [({"machine": "acme-cpu-2core", "host": "h2"}, False), ({}, False), (HOST, True)]
)
def test_speed_is_of_one_host_and_of_real_kernels(environment, simulated):
    before, after = rows(timed(seed=1), dataclasses.replace(timed(faster=2.0, seed=2), simulated=simulated))
    after = Row((dataclasses.replace(after.records[0], environment=environment),))
    changes = find_changes(before, after)
    assert changes.found == ()
    assert bool(changes.elsewhere) is not simulated


def test_bytes_are_counted_wherever_they_are():
    small, large = (
        make(metrics={"stored_bytes": Metric(size), "compression": Metric(1e6 / size)}, samples={}, environment=place)
        for size, place in ((5e5, HOST), (1e6, {}))
    )
    before, after = rows(large, small)
    assert verdicts(before, after) == {"stored_bytes": "smaller", "compression": "smaller"}
    assert verdicts(after, before) == {"stored_bytes": "larger", "compression": "larger"}
    assert all(change.low is None and change.basis == "count" for change in find_changes(before, after).found)
    close = dataclasses.replace(large, metrics={"stored_bytes": Metric(1.01e6)})
    assert verdicts(*rows(large, close)) == {"stored_bytes": "indistinguishable"}
    assert verdicts(*rows(large, close), Effects(relative=1.0)) == {"stored_bytes": "larger"}


def test_a_count_may_come_from_nothing():
    before, after = rows(*(make(metrics={"metadata_bytes": Metric(size)}, samples={}) for size in (0.0, 9.0)))
    assert verdicts(before, after) == {"metadata_bytes": "larger"} and verdicts(after, before) == {
        "metadata_bytes": "smaller"
    }


def test_counts_that_seeds_change_have_a_spread():
    def side(*sizes):
        return Row(
            tuple(make("a()", k, metrics={"stored_bytes": Metric(size)}, samples={}) for k, size in enumerate(sizes))
        )

    (change,) = find_changes(side(100.0, 120.0, 90.0), side(110.0, 95.0, 108.0)).found
    assert change.basis == "records" and change.test.p > 0.3
    assert find_changes(side(100.0, 120.0), side(110.0)).untested == ("stored_bytes",)


def test_energy_is_compared_by_its_intervals_and_what_was_measured_once_not_at_all():
    name = "decode_energy_j_per_token_b1_c128"
    first = timed(seed=1, metrics={name: Metric(2.0, 1.9, 2.1), "apply_seconds": Metric(9.0)})
    second = timed(seed=1, metrics={name: Metric(1.0, 0.95, 1.05), "apply_seconds": Metric(1.0)})
    changes = find_changes(*rows(first, second))
    found = {change.metric: change for change in changes.found}
    assert found[name].basis == "intervals" and found[name].value == pytest.approx(0.5)
    assert verdicts(*rows(first, second))[name] == "less" and changes.untested == ("apply_seconds",)


def test_other_protocols_are_never_compared():
    name = f"decode_speedup_{POINT}"
    before, after = rows(
        timed(seed=1, protocols={name: "batch 1"}), timed(faster=2.0, seed=2, protocols={name: "batch 8"})
    )
    changes = find_changes(before, after)
    assert changes.found == () and changes.apart == (name,)


def test_answers_of_a_trained_task_are_compared_by_item():
    rng = np.random.default_rng(0)
    losses = rng.normal(1.0, 0.3, 64)
    records = [
        make("a()", metrics={"completion_nll": Metric(float(x.mean()))}, samples={"completion_nll": x.tolist()})
        for x in (losses, losses + rng.normal(0.1, 0.02, 64))
    ]
    assert verdicts(*rows(*records)) == {"completion_nll": "worse"}


def test_identical_rows_are_indistinguishable():
    one = timed(seed=1, step=9.0, metrics={"token_ppl": Metric(9.0)})
    one = dataclasses.replace(one, samples={**one.samples, "token_ppl_window_nll": [2.0, 2.5, 2.1, 2.2]})
    assert set(verdicts(*rows(one, one), Effects(0.0, 0.0)).values()) == {"indistinguishable"}


@pytest.mark.parametrize(
    "definition", [one for one in DEFINITIONS if one.better != "neither"], ids=lambda one: one.pattern
)
def test_every_metric_with_a_better_side_has_two_words(definition):
    """The good one for what the definition calls better."""
    name = next(name for name in _examples(definition))
    test = {True: Estimate(9.0, p=0.0), False: Estimate(-9.0, p=0.0)}
    good = {"better", "faster", "smaller", "less"}
    up, down = (judge(name, test[rose], 0.0, Effects()) for rose in (True, False))
    assert (up in good) == (definition.better == "higher") and (down in good) == (definition.better == "lower")


def _examples(definition):
    from effbench.report.columns import _give_examples

    return _give_examples(definition)


@pytest.mark.parametrize(
    ("metric", "counted"),
    [
        ("stored_bytes", True),
        ("score_peak_allocated_bytes", True),
        ("score_peak_rss_bytes", False),
        ("apply_peak_process_bytes", False),
        ("fit_step_ms", False),
        ("decode_flops_per_token_c128", True),
        ("tokens_per_pass", False),
        ("fit_energy_j", False),
        ("fit_tokens", True),
    ],
)
def test_what_is_counted(metric, counted):
    assert is_counted(metric) is counted
