"""What a replay says: planted differences of every kind are found, and nothing else is called a drift."""

from __future__ import annotations

import dataclasses
import math

import pytest
from fake_records import make
from hypothesis import given
from hypothesis import strategies as st

from effbench.records.definitions import DEFINITIONS, FIELDS
from effbench.records.metric import Metric
from effbench.report.replay import judge_replay, list_differences, sort_metric

HERE = {"threads": 1, "dtype": "float32", "host": "here", "machine": "acme"}
RECORD = make("gptq(bits=4)", worse=0.02, settings=HERE)


def change(metric=None, record=RECORD, samples=None, **values):
    """The record with another metric, other samples or other fields."""
    if metric is not None:
        values["metrics"] = record.metrics | {metric[0]: Metric(*metric[1:])}
    if samples is not None:
        values["samples"] = dict(record.samples) | samples
    cell = {key: values.pop(key) for key in list(values) if key in ("settings", "digests", "seed")}
    return dataclasses.replace(record, cell=dataclasses.replace(record.cell, **cell), **values)


def names(replay):
    return [drift.metric for drift in replay.drifts]


def test_the_same_numbers_reproduce_to_the_last_bit():
    replay = judge_replay(RECORD, change())
    assert (replay.verdict, replay.drifts, replay.differences, replay.why) == ("reproduced", (), (), "")
    assert replay.exact == replay.judged["quality"] == 5 and replay.items == 180
    assert replay.judged["counts"] == 4 and replay.judged["times"] == 3
    assert replay.left == {"peaks": 2, "times": 1}  # no interval: apply_seconds


@given(place=st.integers(0, 59), up=st.booleans())
def test_one_bit_of_one_item_is_a_drift_on_the_same_host(place, up):
    nll = list(RECORD.samples["token_ppl_window_nll"])
    nll[place] = math.nextafter(nll[place], math.inf if up else -math.inf)
    replay = judge_replay(RECORD, change(samples={"token_ppl_window_nll": nll}))
    assert (replay.verdict, names(replay)) == ("drifted", ["token_ppl"])
    (drift,) = replay.drifts
    assert (drift.items, drift.of) == (1, 60)
    assert "the mean is equal" in str(drift) and "1 of 60 items differ" in str(drift)
    assert "within its 95 % interval" in str(drift)


def test_an_item_more_or_less_is_a_drift():
    right = list(RECORD.samples["recall_acc"])
    (drift,) = judge_replay(RECORD, change(samples={"recall_acc": right[:-1]})).drifts
    assert (drift.metric, drift.items) == ("recall_acc", 120)


def test_another_host_may_round_otherwise_and_no_more():
    there = HERE | {"host": "there"}
    value = RECORD.metrics["token_ppl"].value
    nll = [one + 1e-6 for one in RECORD.samples["token_ppl_window_nll"]]
    near = change(("token_ppl", value * math.exp(1e-6)), samples={"token_ppl_window_nll": nll}, settings=there)
    replay = judge_replay(RECORD, near)
    assert replay.verdict == "reproduced" and not replay.same_host
    assert replay.exact == replay.judged["quality"] - 1
    assert replay.differences == ("host: there now, here then",)
    far = [one + 0.01 for one in RECORD.samples["token_ppl_window_nll"]]
    off = change(("token_ppl", value * math.exp(0.01)), samples={"token_ppl_window_nll": far}, settings=there)
    assert names(judge_replay(RECORD, off)) == ["token_ppl"]


def test_bytes_are_equal_wherever_they_are_counted():
    more = ("weight_bytes", RECORD.metrics["weight_bytes"].value + 1)
    for host in ("here", "there"):
        assert names(judge_replay(RECORD, change(more, settings=HERE | {"host": host}))) == ["weight_bytes"]


@pytest.mark.parametrize(
    ("fresh", "host", "drifts"),
    [
        (Metric(1.24, 1.19, 1.29, 12), "here", False),
        (Metric(1.32, 1.305, 1.4, 12), "here", False),  # intervals meet
        (Metric(1.5, 1.45, 1.55, 12), "here", True),
        (Metric(0.5, 0.45, 0.55, 12), "here", True),
        (Metric(1.5), "here", True),  # without an interval the value itself has to be within
        (Metric(1.25), "here", False),
        (Metric(1.5, 1.45, 1.55, 12), "there", False),
    ],
)
def test_times_count_on_their_own_host_within_their_interval(fresh, host, drifts):
    name = "decode_speedup_b1_c128"
    replay = judge_replay(RECORD, change((name, *fresh.__reduce__()[1][:4]), settings=HERE | {"host": host}))
    assert names(replay) == [name] * drifts
    assert replay.left["times"] == (1 if host == "here" else 4)


def test_peaks_of_the_process_and_times_without_an_interval_are_not_judged():
    fresh = change(("score_peak_rss_bytes", 9e9), record=change(("apply_seconds", 99.0)))
    assert judge_replay(RECORD, fresh).verdict == "reproduced"


def test_a_metric_that_is_gone_and_another_protocol_are_drifts():
    less = {name: metric for name, metric in RECORD.metrics.items() if name != "recall_acc"}
    (gone,) = judge_replay(RECORD, change(metrics=less)).drifts
    assert str(gone) == "recall, %: not measured now, 83.3333 then"
    (other,) = judge_replay(RECORD, change(protocols=RECORD.protocols | {"token_ppl": "window 4096"})).drifts
    assert "measured by another protocol: 'window 4096' now" in str(other)


def test_examples_that_were_chosen_are_compared():
    record = change(samples={"chosen by dsir()": [["a", 1.0], ["b", 1.0]]})
    assert judge_replay(record, record).verdict == "reproduced"
    for others in ([["a", 1.0], ["c", 1.0]], [["a", 1.0]], []):
        replay = judge_replay(record, change(samples={"chosen by dsir()": others}))
        assert replay.verdict == "drifted" and "are others" in str(replay.drifts[0])


def test_missing_numbers_among_items_are_equal_to_themselves():
    record = change(samples={"recall_acc": [math.nan, 1.0]})
    assert judge_replay(record, change(samples={"recall_acc": [float("nan"), 1.0]})).verdict == "reproduced"


@pytest.mark.parametrize(
    ("then", "now", "verdict"),
    [
        ("ok", "crashed", "drifted"),
        ("ok", "unsupported", "drifted"),
        ("unsupported", "ok", "drifted"),
        ("ok", "oom", "cannot run"),
        ("ok", "unavailable", "cannot run"),
        ("ok", "timeout", "cannot run"),
        ("unsupported", "unsupported", "reproduced"),
        ("oom", "oom", "reproduced"),
    ],
)
def test_outcomes(then, now, verdict):
    before, after = (change(outcome=one, reason="" if one == "ok" else "why") for one in (then, now))
    replay = judge_replay(before, after)
    assert replay.verdict == verdict and now in replay.why and "why" in replay.why


def test_what_is_different_is_named():
    older = {"cpu": "a", "packages": {"torch": "2.12", "numpy": "2"}, "commit": "0123456789", "dirty": False}
    record = change(environment=older, digests={"probe.cost": "1", "model": "m"})
    newer = {"cpu": "a", "packages": {"torch": "2.13", "numpy": "2"}, "commit": "abcdefabcdef", "dirty": True}
    fresh = change(environment=newer, digests={"probe.cost": "2", "model": "m"}, settings=HERE | {"threads": 2})
    assert list(list_differences(record, fresh)) == [
        "threads: 2 now, 1 then",
        "torch: 2.13 now, 2.12 then",
        "source of probe.cost: commit abcdefabc now, 012345678 then",
    ]
    assert "rtn.bits is new, at its default" in judge_replay(record, fresh, ["rtn.bits"]).differences


def test_every_metric_is_sorted_and_none_that_is_timed_has_to_be_equal():
    """What an instrument of time gives is no count, whatever its family."""
    for one in DEFINITIONS:
        fields = {"peak": "rss", "phase": "decode", "collective": "send", "moment": "last"}
        name = one.pattern.format_map(dict.fromkeys(FIELDS, "1") | fields | {"task": "t", "metric": "m"})
        timed = any(word in one.meaning for word in ("Time ", "The time", "per second", "faster", "Energy", "Power"))
        assert (sort_metric(name) == "times") >= timed, name
