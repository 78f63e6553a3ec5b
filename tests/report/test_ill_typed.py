"""Records hold what anybody wrote into them. Whatever stands in their free fields, reports and comparisons go on."""

import contextlib
import dataclasses

import pytest
from fake_records import make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effbench.core.errors import Usage
from effbench.report.compare import compare_rows, write_comparison
from effbench.report.differences import read_items
from effbench.report.groups import Row, group_records
from effbench.report.pages import FORMATS, render
from effbench.report.published import judge_table, summarise
from effbench.report.verdicts import Effects

json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
samples = st.dictionaries(
    st.sampled_from(
        ["token_ppl_window_nll", "token_ppl", "recall_acc", "flips", "decode_seconds_b1_c128", "apply_seconds"]
    ),
    st.lists(json, max_size=4) | st.lists(st.lists(st.floats(), min_size=2, max_size=2), min_size=1, max_size=4),
)
spoiled = st.fixed_dictionaries(
    {},
    optional={
        "samples": samples,
        "facts": st.dictionaries(st.sampled_from(["type", "weight_update"]), json),
        "log": st.dictionaries(st.sampled_from(["densified", "phases"]), json),
        "environment": st.dictionaries(st.sampled_from(["machine", "host", "commit", "dirty"]), json),
        "protocols": st.dictionaries(st.sampled_from(["token_ppl", "recall_acc", "elsewhere"]), st.text(max_size=8)),
        "started": st.text(max_size=12),
        "reason": st.text(max_size=12),
        "settings": st.dictionaries(st.sampled_from(["threads", "limit", "machine", "window"]), json),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spoiled, st.sampled_from(["ok", "crashed"]))
def test_any_content_of_free_fields(changes, outcome):
    odd = make("rtn(bits=2)", worse=0.9, outcome=outcome, **changes)
    records = [make(), odd, make("gptq()", 1, worse=0.1)]
    for style in FORMATS:
        assert "rtn" in render(records, "quant", style)
    for rows in ((records[0], odd), (odd, records[2])):
        with contextlib.suppress(Usage):
            sides = [Row((record,)) for record in rows]
            write_comparison(*sides, compare_rows(*sides), Effects())
    for table in group_records(records):
        summarise(table, judge_table(table, group_records([make(), make("rtn(bits=2)")])))


@pytest.mark.parametrize(
    "values",
    [
        [],
        ["a", "b"],
        [1, [2]],
        [None, 1.0],
        [[1, 2, 3]],
        [[1, 0]],
        [float("nan")],
        [[]],
        [{}],
        {"a": 1},
        "abc",
        7,
        [10**400],
    ],
)
def test_samples_that_are_no_numbers_are_none(values):
    assert read_items(dataclasses.replace(make(), samples={"recall_acc": values}), "recall_acc") is None


def test_metrics_without_samples_are_shown_and_not_tested():
    text = render([make(), make("rtn()", worse=0.9, samples={})], "quant")
    row = next(line for line in text.splitlines() if line.startswith("| rtn()"))
    assert "±" in row and "↑" not in row
