"""`effbench.records` and `effbench.samples`: what records hold, as data frames."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_records import RECORDS, make, store_records

import effbench
import effbench.records.store  # puts the package in the place of the function
from effbench.core.errors import Usage
from effbench.core.paths import CHECKOUT, PUBLISHED
from effbench.records.record import Metric
from effbench.records.store import Store, latest


@pytest.fixture
def results(tmp_path):
    return store_records(tmp_path / "results").results


def test_a_row_for_every_record_with_its_numbers(results):
    frame = effbench.records(results)
    assert len(frame) == len(RECORDS)
    for record in RECORDS:
        (row,) = frame[frame["record"] == record.name].to_dict("records")
        assert (row["recipe"], row["seed"], row["outcome"]) == (record.cell.recipe, record.cell.seed, record.outcome)
        assert row["simulated"] is record.simulated and row["imported"] is False
        for name in {name for one in RECORDS for name in one.metrics}:
            metric = record.metrics.get(name)
            assert np.isnan(row[name]) if metric is None else row[name] == metric.value
    assert {str(frame[name].dtype) for name in ("token_ppl", "seconds")} == {"float64"}


def test_choosing(results):
    assert set(effbench.records(results, recipe="gptq*")["seed"]) == {0, 1, 2}
    assert set(effbench.records(results, recipe=["baseline", "rtn(bits=2)"])["recipe"]) == {"baseline", "rtn(bits=2)"}
    assert list(effbench.records(results, outcome="oom")["reason"]) == ["needs 9 GiB"]
    assert len(effbench.records(str(results), suite="quant", tier="quick", model="tiny")) == len(RECORDS)


def test_intervals(results):
    frame = effbench.records(results, recipe="baseline", intervals=True)
    metric = RECORDS[0].metrics["token_ppl"]
    row = frame.iloc[0]
    assert (row["token_ppl_low"], row["token_ppl_high"], row["token_ppl_n"]) == (metric.low, metric.high, metric.n)
    assert np.isnan(row["stored_bytes_low"]) and "token_ppl_low" not in effbench.records(results)


def test_samples_pair_by_item(results):
    frame = effbench.samples("recall_acc", results, recipe=["baseline", "rtn(bits=2)"])
    wide = frame.pivot(index="item", columns="recipe", values="value")
    assert (wide["baseline"] - wide["rtn(bits=2)"]).sum() == 40 and len(wide) == 120
    store_records(
        results, [make("a()", metrics={"x_word_ppl": Metric(2.0)}, samples={"x_word_ppl": [[-1.0, 2], [-2.0, 3]]})]
    )
    pairs = effbench.samples("x_word_ppl", results)
    assert list(pairs["value_0"]) == [-1.0, -2.0] and list(pairs["value_1"]) == [2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "qaunt"}, "did you mean 'quant'"),
        ({"tier": "fast"}, "unknown tier 'fast'"),
        ({"model": "tony"}, "did you mean 'tiny'"),
        ({"outcome": "bad"}, "unknown outcome 'bad'"),
        ({"recipe": "nosuch*"}, "that fit; leave out what chooses"),
    ],
)
def test_what_does_not_fit_is_named(results, options, message):
    with pytest.raises(Usage, match=re.escape(message)):
        effbench.records(results, **options)


def test_no_records_and_no_samples(results, tmp_path):
    with pytest.raises(Usage, match="no records in"):
        effbench.records(tmp_path / "nowhere")
    with pytest.raises(Usage, match="did you mean 'recall_acc'"):
        effbench.samples("recal_acc", results)


def test_what_cannot_be_read_is_warned_of(results):
    (results / "records" / "quant" / "v1" / "odd.json").write_text("{")
    with pytest.warns(UserWarning, match="odd.json: skipped"):
        assert len(effbench.records(results)) == len(RECORDS)


def test_own_records_first_else_published_ones(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if PUBLISHED is not None and PUBLISHED.is_dir():
        published = latest(Store(PUBLISHED).read("quant")[0])
        assert len(effbench.records(suite="quant")) == len(published)
    Path("results").rename("runs")
    assert len(effbench.records()) == len(RECORDS)


def test_function_and_package_have_one_name(results):
    """Before the package is imported the function stands there; afterwards the package, which can be called."""
    code = (
        "import effbench, sys; assert 'effbench.records' not in sys.modules and 'pandas' not in sys.modules;"
        f"first = effbench.records({str(results)!r}); second = effbench.records({str(results)!r});"
        "from effbench.records.metric import Metric; from effbench import records;"
        f"assert first.equals(second) and first.equals(records(results={str(results)!r})); print(len(first))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.stdout.strip() == str(len(RECORDS)), done.stderr
    assert "a row for the last attempt" in effbench.records.__doc__
