"""One record as text: what is in it comes back, whatever a method has put there, and older schemas are read."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effbench.core.plain import plain
from effbench.records.lazy import Lazy
from effbench.records.metric import Metric
from effbench.records.record import SCHEMA, from_json
from effbench.records.upgrade import UPGRADES, separate


def test_all_of_a_record_is_in_its_text(rich):
    assert from_json(rich.to_json()) == rich


def test_the_text_has_a_line_for_each_field(rich):
    assert json.loads(rich.to_json())["schema"] == SCHEMA
    assert len(rich.to_json().splitlines()) <= 20


class Colour(enum.IntEnum):
    RED = 3


class Mute:
    def __str__(self):
        raise RuntimeError("not today")


def circle():
    log = {}
    log["again"] = log
    return log


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ({1: "a", (2, 3): "b", None: "c"}, {"1": "a", "(2, 3)": "b", "None": "c"}),
        ({"1": "a", 1: "b"}, {"1": "a", "1 (int)": "b"}),
        ([math.nan, math.inf, 1.5], [None, None, 1.5]),
        ({"x": (1, 2)}, {"x": [1, 2]}),
        (np.float32(0.5), 0.5),
        (np.array([[1, 2]]), [[1, 2]]),
        (torch.tensor([0.5, math.nan]), [0.5, None]),
        (Path("a/b"), "a/b"),
        (Colour.RED, 3),
        (2**80, str(2**80)),
        ("lone \ud800", "lone \\ud800"),
        (Mute(), "<Mute>"),
        (b"bytes", "b'bytes'"),
    ],
)
def test_any_value_is_put_in_plain_words(rich, value, kept):
    assert plain(value) == kept
    record = dataclasses.replace(rich, log={"value": value}, facts={"value": value}, environment={"value": value})
    back = from_json(record.to_json())
    assert back.log["value"] == back.facts["value"] == back.environment["value"] == kept


def test_what_holds_itself_ends(rich):
    text = dataclasses.replace(rich, log=circle()).to_json()
    assert from_json(text).log["again"]["again"]


def test_numbers_that_are_not_finite_are_left_out(rich):
    metrics = {"token_ppl": Metric(math.nan), "flips": Metric(0.5, -math.inf, math.nan, 3, {"width": math.inf})}
    back = from_json(dataclasses.replace(rich, metrics=metrics).to_json())
    assert back.metrics == {"flips": Metric(0.5, n=3)}
    assert back.protocols == {}  # a protocol of no number says nothing


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(scalars, inner, max_size=3)
        | st.tuples(inner, inner)
        | st.frozensets(scalars, max_size=3)
    ),
    max_leaves=10,
)


@given(value=values)
def test_plain_values_are_json_and_stay_what_they_are(value):
    once = plain(value)
    assert json.loads(json.dumps(once, allow_nan=False)) == once
    assert plain(once) == once


def test_lazy_content_is_loaded_once_and_like_a_dict():
    calls = []
    lazy = Lazy(lambda: calls.append(1) or {"a": 1})
    assert not calls
    assert lazy == {"a": 1} and lazy == {"a": 1} and lazy | {"b": 2} == {"a": 1, "b": 2} and {"a": 0} | lazy == {"a": 1}
    assert pickle.loads(pickle.dumps(lazy)) == {"a": 1} and len(lazy) == 1 and calls == [1]


# ---- older schemas ----

SPEED = (
    "batch 8, 32 tokens after context 128, CPU, 1 threads, random tokens, model and reference in turns (ABBA){seen}; "
    "1+3 warm-up calls, 6 rounds, {width}, stopped by the {why}; median step"
)
UNTIL = ", until the ratio's interval is within 2% or 1 s are over; median step"


def old(record, schema, **changes):
    """The text of a record as an older schema had it."""
    body = json.loads(record.to_json()) | {"schema": schema}
    keys = ("value", "low", "high", "n")
    body["metrics"] = {name: dict(zip(keys, values, strict=False)) for name, values in body["metrics"].items()}
    body["environment"].pop("host", None)
    body.pop("layers", None)
    return body | changes


@pytest.mark.parametrize(
    ("tokens", "length", "told"), [(4096, 128, "32 sequences"), (4096, None, "4,096 tokens"), (0, 128, "none")]
)
def test_schema_1_said_no_calibration_data(rich, tokens, length, told):
    cell = dataclasses.replace(rich.cell, settings={"calibration_length": length})
    facts = {"calibration_data": "none", "weight_update": "none"}
    new = dataclasses.replace(rich, cell=cell, facts=facts, log={"calibration_tokens": tokens})
    assert from_json(json.dumps(old(new, 1))).facts == facts | {"calibration_data": told}


def test_schema_2_had_findings_in_its_protocols(rich):
    width, why = "ratio's interval 18.7% wide", "cap of 1 s"
    seen = ", clocks held back by sw_power_cap"
    texts = {
        "decode_ms_per_token_b8_c128": SPEED.format(seen=seen, width=width, why=why),
        "decode_speedup_b8_c128": SPEED.format(seen="", width="too few for an interval", why="interval within 2%"),
        "apply_seconds": "wall clock, summed over gptq(bits=4), fit(steps=2)",
        "bits_per_weight": "weights and metadata of the 42 compressed linears, without biases",
        "recall_acc": "lm-eval 0.4.13, oneblock, 7 contexts of all tasks cut from the left, 100 of 400 items",
        "prefill_energy_j_per_token_b8_c128": "NVML total energy, idle included, beside 1 other process; 12 prefills",
        "decode_energy_j_per_token_b8_c128": "NVML total energy, idle included; decode: eager; 9 x 32 tokens, less",
        "token_ppl": "ppl.token.window512",
    }
    new = dataclasses.replace(rich, metrics={name: Metric(1.0) for name in texts}, protocols=texts)
    record = from_json(json.dumps(old(new, 2)))
    assert record.protocols == {
        "decode_ms_per_token_b8_c128": SPEED.format(seen="", width="", why="").partition("; 1+3")[0] + UNTIL,
        "decode_speedup_b8_c128": SPEED.format(seen="", width="", why="").partition("; 1+3")[0] + UNTIL,
        "apply_seconds": "wall clock, summed over the steps of the recipe",
        "bits_per_weight": "weights and metadata of the compressed linears, or of all but the head where none is, "
        "without biases",
        "recall_acc": "lm-eval 0.4.13, oneblock, 100 of 400 items",
        "prefill_energy_j_per_token_b8_c128": "NVML total energy, idle included; prefills",
        "decode_energy_j_per_token_b8_c128": "NVML total energy, idle included; decode: eager; 32 tokens a call, less",
        "token_ppl": "ppl.token.window512",
    }
    warm = {"warm_up_calls": 1, "reference_warm_up_calls": 3}
    assert {name: metric.findings for name, metric in record.metrics.items() if metric.findings} == {
        "decode_ms_per_token_b8_c128": warm
        | {"capped": True, "ratio_interval": 0.187, "device_state": "clocks held back by sw_power_cap"},
        "decode_speedup_b8_c128": warm | {"capped": False},
        "bits_per_weight": {"linears": 42, "compressed": True},
        "recall_acc": {"cut_contexts": 7},
        "prefill_energy_j_per_token_b8_c128": {"calls": 12, "device_state": "beside 1 other process"},
        "decode_energy_j_per_token_b8_c128": {"calls": 9},
    }


def test_hosts_of_old_records_are_told_apart(rich):
    hosts = set()
    for kernel in ("6.18.1", "6.18.1", "6.18.2"):
        environment = {"platform": f"Linux {kernel}", "cpu": "X", "cores": 2, "memory_bytes": 8, "machine": "x-2core"}
        hosts.add(from_json(json.dumps(old(rich, 2, environment=environment))).host)
    assert len(hosts) == 2 and all(host.startswith("unnamed-") for host in hosts)
    assert from_json(json.dumps(old(rich, 2, environment={}))).host == ""


def test_a_text_without_findings_stays(rich):
    assert separate("token_ppl", "ppl of {braces}", 1.0) == ("ppl of {braces}", {})


def test_the_chain_of_upgrades_has_no_gap():
    assert sorted(UPGRADES) == list(range(1, SCHEMA))


def test_what_is_chosen_for_a_cell_comes_before_what_its_environment_says(rich):
    assert rich.host == "0123456789ab"
    cell = dataclasses.replace(rich.cell, settings={"host": "abc"})
    assert dataclasses.replace(rich, cell=cell).host == "abc"
