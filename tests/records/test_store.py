"""The folder of records: whole or absent, never lost, never double."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from effbench.core.errors import Usage
from effbench.records.metric import Metric
from effbench.records.record import SCHEMA, Record, from_json
from effbench.records.store import Store, latest


@pytest.fixture
def record(make_job):
    return Record(make_job("row").cell, "ok", metrics={"ppl": Metric(12.5, 12.0, 13.0, 100)})


def test_round_trip(store, record):
    assert store.write(record) == record
    assert store.read() == ([record], [])
    path = store.folder("fakes", 1) / record.name
    assert {found.name for found in path.parent.iterdir()} == {record.name, "protocols.json"}
    assert path.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    ("tokens", "length", "told"), [(4096, 128, "32 sequences"), (4096, None, "4,096 tokens"), (0, 128, "none")]
)
def test_an_older_record_is_upgraded(record, tokens, length, told):
    cell = dataclasses.replace(record.cell, settings={"calibration_length": length})
    facts = {"calibration_data": "none", "weight_update": "none"}
    new = dataclasses.replace(record, cell=cell, facts=facts, log={"calibration_tokens": tokens})
    old = json.loads(new.to_json()) | {"schema": 1}
    assert from_json(json.dumps(old)) == dataclasses.replace(new, facts=facts | {"calibration_data": told})


def test_reading_by_suite_and_version(store, record):
    other = dataclasses.replace(record, cell=dataclasses.replace(record.cell, suite="other", suite_version=2))
    store.write(record)
    store.write(other)
    assert store.read("fakes")[0] == [record]
    assert store.read("other", 2)[0] == [other]
    assert store.read("other", 1)[0] == []
    assert len(store.read()[0]) == 2


def test_a_missing_folder_is_empty(store):
    assert store.read() == ([], [])


def test_the_first_to_finish_is_kept(store, record):
    late = dataclasses.replace(record, metrics={"ppl": Metric(99.0)})
    store.write(record)
    assert store.write(late) == record
    assert store.read()[0] == [record]


def test_a_late_failure_does_not_stand_above_a_result(store, record):
    store.write(record)
    assert store.write(dataclasses.replace(record, outcome="crashed")) == record
    assert len(store.read()[0]) == 1


def test_a_result_is_not_lost_to_another_run_s_failure(store, record):
    store.write(dataclasses.replace(record, outcome="crashed", reason="elsewhere"))
    kept = store.write(record)
    assert kept.attempt == 2
    records = store.read()[0]
    assert len(records) == 2
    assert latest(records) == {record.cell.identity: kept}


def test_the_last_attempt_is_reported(record):
    attempts = [dataclasses.replace(record, outcome="timeout", attempt=n) for n in (1, 3, 2)]
    assert latest(attempts)[record.cell.identity].attempt == 3
    assert latest([*attempts, record])[record.cell.identity].outcome == "ok"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ('{"schema": 1, "cell": {"suite"', "not JSON"),
        ('{"hello": "world"}', "no schema number"),
        ("[1, 2]", "no schema number"),
        (json.dumps({"schema": SCHEMA + 1}), "newer than this effbench"),
        (json.dumps({"schema": SCHEMA}), "do not fit"),
        (b"\xff\xfe binary", "skipped"),
    ],
)
def test_what_is_no_record_is_reported_and_skipped(store, record, text, words):
    store.write(record)
    path = store.folder("fakes", 1) / "stray.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    records, (note,) = store.read()
    assert records == [record]
    assert str(path) in note
    assert words in note


def test_a_truncated_record_does_not_block_its_cell(store, record):
    path = store.folder("fakes", 1) / record.name
    path.parent.mkdir(parents=True)
    path.write_text(record.to_json()[:100])
    assert store.write(record).attempt == 2
    assert [found.outcome for found in store.read()[0]] == ["ok"]


def test_nothing_is_left_after_a_failed_write(store, record, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.write(record)
    assert [path for path in store.results.rglob("*") if path.is_file()] == []


def _write_all(arguments):
    folder, records = arguments
    return [Store(folder).write(record) for record in records]


def test_many_writers_at_once(tmp_path, record):
    """Eight processes write the same forty cells: every cell has one record, and it is one that was written."""
    versions = [
        [
            dataclasses.replace(
                record,
                cell=dataclasses.replace(record.cell, seed=seed),
                metrics={"writer": Metric(writer)},
            )
            for seed in range(40)
        ]
        for writer in range(8)
    ]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        answers = pool.map(_write_all, [(tmp_path, records) for records in versions])
    records, notes = Store(tmp_path).read()
    assert notes == []
    assert sorted(found.cell.seed for found in records) == list(range(40))
    standing = {found.cell.seed: found for found in records}
    for answer in answers:
        assert {found.cell.seed: found for found in answer} == standing


def test_threads_share_a_store_too(store, record):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(store.write, [record] * 32))
    assert set(map(id, answers)) and len(store.read()[0]) == 1


def test_an_unwritable_folder_is_usage(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Usage, match="cannot write there"):
        Store(tmp_path / "file" / "results").check()


def test_checking_creates_nothing(tmp_path):
    Store(tmp_path / "a" / "b").check()
    assert list(tmp_path.iterdir()) == []
