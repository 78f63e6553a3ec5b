"""Publishing: all of the records in one file, and nothing else left of them."""

from __future__ import annotations

import dataclasses
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effbench.core.errors import Usage
from effbench.records import packed
from effbench.records.publication import publish_records
from effbench.records.record import from_json
from effbench.records.samples import Samples, columns, from_columns
from effbench.records.store import Store


def seeded(record, seed, **changes):
    return dataclasses.replace(record, cell=dataclasses.replace(record.cell, seed=seed), **changes)


def test_what_is_published_comes_back_whole(store, rich):
    records = [seeded(rich, 0), seeded(rich, 1, samples={}, log={"steps": []}), seeded(rich, 2, outcome="ok")]
    path = publish_records(records, store.results, "full")
    assert path == store.folder("fakes", 1) / "full.parquet"
    again, notes = store.read()
    assert notes == [] and sorted(again, key=lambda record: record.cell.seed) == records
    for record in again:
        assert record.to_json() == from_json(record.to_json()).to_json()
    assert not list(store.results.rglob("*.tmp"))


def test_publishing_again_replaces(store, rich):
    publish_records([seeded(rich, seed) for seed in range(3)], store.results, "full")
    kept = store.read()[0][:2]
    publish_records(kept, store.results, "full")
    assert store.read() == (kept, [])


def test_record_files_of_its_subject_are_superseded(store, rich):
    quick = dataclasses.replace(rich, cell=dataclasses.replace(rich.cell, tier="full"))
    for record in (rich, seeded(rich, 1), quick):
        store.write(record)
    publish_records([seeded(rich, 2)], store.results, "quick")
    assert sorted((r.cell.tier, r.cell.seed) for r in store.read()[0]) == [("full", 0), ("quick", 2)]
    assert len(list((store.results / "samples").rglob("*.json.gz"))) == 1


def test_what_nothing_refers_to_goes(store, rich):
    old = dataclasses.replace(rich, environment={"machine": "old"}, protocols={"token_ppl": "old"})
    publish_records([old], store.results, "full")
    publish_records([rich], store.results, "full")
    (environment,) = (store.records / "environments").iterdir()
    assert "acme" in environment.read_text()
    assert "old" not in (store.folder("fakes", 1) / "protocols.json").read_text()
    assert store.read() == ([rich], [])


def test_nothing_goes_while_a_record_is_unreadable(store, rich):
    publish_records([dataclasses.replace(rich, environment={"machine": "old"})], store.results, "full")
    (store.folder("fakes", 1) / "stray.json").write_text("truncated")
    publish_records([rich], store.results, "full")
    assert len(list((store.records / "environments").iterdir())) == 2


@pytest.mark.parametrize("name", ["", "../full", "a/b", ".hidden", "a\0b"])
def test_a_name_that_is_no_file_s_is_refused(store, rich, name):
    with pytest.raises(Usage, match="its name becomes a file's"):
        publish_records([rich], store.results, name)
    assert not store.results.exists()


def test_records_that_do_not_belong_together_are_refused(store, rich):
    other = dataclasses.replace(rich, cell=dataclasses.replace(rich.cell, suite="other"))
    for records in ([], [rich, other], [rich, rich]):
        with pytest.raises(Usage, match="of one version of one suite, each once"):
            publish_records(records, store.results, "full")


def test_a_full_disk_leaves_the_publication_as_it_was(store, rich, monkeypatch):
    publish_records([rich], store.results, "full")

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            publish_records([seeded(rich, 1)], store.results, "full")
    assert store.read() == ([rich], [])
    assert not list(store.results.rglob("*.tmp"))


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60)
items = (
    st.lists(numbers, max_size=4)
    | st.lists(st.tuples(numbers, numbers).map(list), max_size=4)
    | st.lists(st.none() | st.text() | numbers | st.lists(numbers, max_size=2), max_size=4)
    | st.lists(st.dictionaries(st.text(), numbers, max_size=2), max_size=3)
)
names = st.text(max_size=5)
layer_logs = st.dictionaries(names, st.dictionaries(names, numbers | st.text(), max_size=2) | st.none(), max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(samples=st.dictionaries(names, items, max_size=4), layers=layer_logs)
def test_any_samples_and_layers_come_back(samples, layers, rich, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "x.parquet"
    entry = dataclasses.replace(rich, samples={}, log={})
    summary = packed.read_text(entry.to_json())
    summary.environment = summary.protocols = "0" * 8
    path.write_bytes(packed.pack([("a", summary, Samples(columns(samples), layers)), ("b", summary, Samples())]))
    back = packed.read_packed(path, "a")
    assert from_columns(back.columns) == samples and back.layers == layers
    assert packed.read_packed(path, "b") == Samples([], {})
    summaries, notes = packed.read_summaries(path)
    assert notes == [] and summaries["a"] == summary


def test_reading_a_publication_loads_no_results_per_item(store, rich, monkeypatch):
    publish_records([rich], store.results, "full")
    monkeypatch.setattr(packed, "_all_samples", None)
    records, _ = Store(store.results).read()
    with pytest.raises(TypeError):
        len(records[0].samples)
