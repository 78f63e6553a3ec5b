"""Tests of rows that are kept with a publication: used while they fit, and noticed when they do not."""

import dataclasses
import json

import pytest
from fake_records import RECORDS, make, store_records

from effbench.records.record import Metric
from effbench.records.store import Store
from effbench.report import differences
from effbench.report.differences import compute_row_tests, compute_tests, parse_kept, read_kept, write_kept
from effbench.report.groups import group_records
from effbench.report.pages import check, write


@pytest.fixture
def results(tmp_path):
    store_records(tmp_path / "results")
    write(tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def computed(monkeypatch):
    """How many tests are computed."""
    calls = []
    original = differences._test_metric

    def count(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(differences, "_test_metric", count)
    return calls


def file(results):
    return results / "statistics" / "quant.json"


def test_nothing_is_computed_twice(results, computed):
    assert check(results) == [] and computed == []
    kept = read_kept(file(results))
    (table,) = group_records(RECORDS)
    assert compute_tests(table, kept) == compute_tests(table) and computed


def test_a_new_row_costs_its_own_tests_alone(results, computed):
    Store(results).write(make("rtn(bits=3)", worse=0.1, bits=3.25))
    assert check(results)
    assert {pairs.after.records[0].cell.recipe for pairs, _ in computed} == {"rtn(bits=3)"}


def test_what_is_kept_is_what_is_computed():
    tables = group_records(RECORDS)
    kept = parse_kept(write_kept(tables, {}))
    (table,) = tables
    assert list(compute_row_tests(table, kept).values()) == list(compute_row_tests(table).values())
    assert len(kept) == len(table.rows) - 1


def test_a_changed_record_makes_the_file_stale(results, computed):
    """Another value in a record of the same identity: its tests are computed anew and the file is named."""
    path = next((results / "records").rglob("rtn_bits_2*.json"))
    record = json.loads(path.read_text())
    record["metrics"]["bits_per_weight"][0] = 2.5
    path.write_text(json.dumps(record))
    assert any("statistics/quant.json: line" in line for line in check(results))
    assert {pairs.after.records[0].cell.recipe for pairs, _ in computed} == {"rtn(bits=2)"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace(differences.get_version(), "0" * 16),  # other statistics
        lambda text: "\n".join(text.split("\n")[:-4] + text.split("\n")[-3:]),  # a row is missing
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '{"statistics": "' + differences.get_version() + '", "rows": {"a": {"token_ppl": [null, 1]}}}',
    ],
)
def test_a_stale_file_is_noticed_and_written_anew(results, spoil):
    right = file(results).read_text()
    spoiled = spoil(right)
    assert spoiled != right
    file(results).write_text(spoiled)
    (difference,) = check(results)  # the tables do not depend on what was spoiled
    assert "statistics/quant.json: line" in difference
    assert write(results) == [file(results)] and file(results).read_text() == right


def test_a_tampered_test_shows_in_the_tables(results):
    """Kept numbers are believed, so the tables say something else than those that were written."""
    text = file(results).read_text()
    kept = json.loads(text)
    row = next(row for row in kept["rows"].values() if row["token_ppl"][1] < 1e-6)
    spoiled = text.replace(json.dumps(row), json.dumps(row | {"token_ppl": [row["token_ppl"][0], 1.0]}))
    assert spoiled != text
    file(results).write_text(spoiled)
    assert {line.partition(":")[0].rpartition("/")[2] for line in check(results)} == {"quant.md"}


def test_rows_of_other_records_have_other_keys():
    baseline, row = group_records(RECORDS[:2])[0].rows
    renamed = dataclasses.replace(row.records[0].cell, recipe="other")
    others = [
        dataclasses.replace(row.records[0], attempt=2),
        dataclasses.replace(row.records[0], started="2027-01-01T00:00:00+00:00"),
        dataclasses.replace(row.records[0], metrics={"token_ppl": Metric(1.0)}),
    ]
    keys = {differences.make_key(baseline, dataclasses.replace(row, records=(other,))) for other in others}
    assert len(keys) == 3 and differences.make_key(baseline, row) not in keys
    same = dataclasses.replace(row, records=(dataclasses.replace(row.records[0], cell=renamed),))
    assert differences.make_key(baseline, same) == differences.make_key(baseline, row)  # a name measures nothing
