"""The folder of records: whole or absent, never lost, never double."""

from __future__ import annotations

import dataclasses
import gzip
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from effbench.core.errors import Usage
from effbench.core.plain import plain
from effbench.records.metric import Metric
from effbench.records.reader import read_record
from effbench.records.record import SCHEMA, Record
from effbench.records.samples import columns, from_columns
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


def test_protocols_of_many_writers_are_all_there(tmp_path, record):
    """Processes that add texts at the same time lose none of each other's."""
    versions = [
        [
            dataclasses.replace(
                record,
                cell=dataclasses.replace(record.cell, seed=100 * writer + seed),
                protocols={"ppl": f"by {writer}, {seed}"},
            )
            for seed in range(20)
        ]
        for writer in range(4)
    ]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.map(_write_all, [(tmp_path, records) for records in versions])
    records, notes = Store(tmp_path).read()
    assert notes == []
    assert {found.protocols["ppl"] for found in records} == {f"by {i}, {k}" for i in range(4) for k in range(20)}


def test_a_summary_holds_neither_items_nor_layers(store, rich):
    store.write(rich)
    text = (store.folder("fakes", 1) / rich.name).read_text()
    for word in ("nll", "model.layers.0.q", "torch", "ppl.token.window512"):
        assert word not in text
    assert store.read() == ([rich], [])


def test_the_same_log_likelihoods_are_stored_once(rich):
    shared = columns(plain(rich.samples))
    assert sum(-192.9 in column.values for column in shared) == 1
    assert from_columns(shared) == rich.samples


def test_listing_loads_no_results_per_item(store, rich, monkeypatch):
    store.write(rich)

    def refuse(folder, name):
        raise AssertionError("not asked for")

    monkeypatch.setattr("effbench.records.reader.read_samples", refuse)
    (record,) = store.read()[0]
    copied = dataclasses.replace(record, cell=record.cell)
    with pytest.raises(AssertionError, match="not asked for"):
        len(copied.samples)


def test_environments_and_protocols_are_written_once(store, rich):
    for seed in range(5):
        store.write(dataclasses.replace(rich, cell=dataclasses.replace(rich.cell, seed=seed)))
    assert len(list((store.records / "environments").iterdir())) == 1
    first, second, *_ = store.read()[0]
    assert first.protocols is second.protocols and first.environment is second.environment


@pytest.fixture
def parts(store, rich):
    """The files that one record consists of."""
    store.write(rich)
    folder = store.folder("fakes", 1)
    return {
        "samples": next((store.results / "samples").rglob("*.json.gz")),
        "protocols": folder / "protocols.json",
        "environment": next((store.records / "environments").iterdir()),
    }


HARM = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "foreign": lambda path: path.write_bytes(b'{"something": "else"}'),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a folder": lambda path: path.unlink() or path.mkdir(),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("part", ["samples", "protocols", "environment"])
def test_a_record_is_read_without_what_is_damaged(store, rich, parts, part, harm, caplog):
    HARM[harm](parts[part])
    (record,), notes = store.read()
    empty = {"samples": {}, "protocols": {}, "environment": {}}[part]
    assert dict(getattr(record, part)) == empty
    told = notes + [entry.getMessage() for entry in caplog.records]
    assert told and all("\n" not in line for line in told)
    named = rich.name if part == "samples" else parts[part].name
    assert any(named in line for line in told)
    for other in {"samples", "protocols", "environment"} - {part}:
        assert getattr(record, other) == getattr(rich, other)
    assert record.metrics == rich.metrics


def test_damaged_protocols_are_put_aside_and_written_anew(store, rich, parts):
    parts["protocols"].write_bytes(b"damaged")
    store.write(dataclasses.replace(rich, cell=dataclasses.replace(rich.cell, seed=9)))
    assert all(record.protocols == rich.protocols for record in store.read()[0])
    assert (parts["protocols"].parent / "protocols.damaged").read_bytes() == b"damaged"


def test_samples_that_are_another_record_s_are_not_taken(store, rich, parts, caplog):
    parts["samples"].write_bytes(gzip.compress(b'{"columns":[],"layers":{}}'))
    assert dict(store.read()[0][0].samples) == {}
    assert "not what its name says" in caplog.text


def test_a_record_in_a_foreign_folder_is_skipped(store, rich):
    store.write(rich)
    other = store.folder("elsewhere", 1)
    other.mkdir(parents=True)
    (store.folder("fakes", 1) / rich.name).rename(other / rich.name)
    records, notes = store.read()
    assert records == [] and "it belongs to fakes/v1" in notes[-1]


def test_a_folder_removed_in_mid_run_is_made_again(store, rich):
    store.write(rich)
    shutil.rmtree(store.results)
    store.write(rich)
    assert store.read() == ([rich], [])


def test_a_folder_removed_while_it_is_written_to(store, rich, monkeypatch):
    link, removed = os.link, []

    def vanish(source, target):
        if not removed:
            removed.append(1)
            shutil.rmtree(store.results)
        link(source, target)

    monkeypatch.setattr(os, "link", vanish)
    store.write(rich)
    assert removed and rich.name in os.listdir(store.folder("fakes", 1))


def test_a_file_in_the_way_is_an_error_of_the_system(store, rich):
    store.results.mkdir()
    store.records.write_text("in the way")
    with pytest.raises(OSError) as error:
        store.write(rich)
    assert error.value.strerror
    with pytest.raises(Usage, match="cannot write there"):
        store.check()


def test_old_files_lie_beside_new_ones(store, rich):
    folder = store.folder("fakes", 1)
    folder.mkdir(parents=True)
    body = json.loads(rich.to_json()) | {"schema": 2}
    body["metrics"] = {"token_ppl": {"value": 12.5, "n": 8}}
    (folder / "old.json").write_text(json.dumps(body))
    store.write(rich)
    records, notes = store.read()
    assert notes == [] and sorted(len(record.metrics) for record in records) == [1, 4]


def test_a_file_that_needs_no_other_is_read_anywhere(tmp_path, rich):
    path = tmp_path / "record.json"
    path.write_text(rich.to_json())
    assert read_record(path) == rich


def test_an_unwritable_folder_is_usage(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Usage, match="cannot write there"):
        Store(tmp_path / "file" / "results").check()


def test_checking_creates_nothing(tmp_path):
    Store(tmp_path / "a" / "b").check()
    assert list(tmp_path.iterdir()) == []
