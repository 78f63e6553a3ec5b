"""The table of all records: as fresh as the folder, whatever happened to it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from effbench.core.errors import Usage
from effbench.records import index as module
from effbench.records.definitions import HEADLINES
from effbench.records.index import list_records
from effbench.records.publication import publish_records
from effbench.records.reader import Reader


def seeded(record, seed, **changes):
    return dataclasses.replace(record, cell=dataclasses.replace(record.cell, seed=seed, **changes))


def seeds(store, suite=None):
    table, notes = store.index(suite)
    assert notes == []
    return sorted(table["seed"].to_pylist())


def test_a_row_says_what_the_record_says(store, rich):
    store.write(rich)
    ((row,), notes) = list_records(store.results, {})
    assert notes == []
    assert row == {
        "suite": "fakes",
        "version": 1,
        "tier": "quick",
        "recipe": "gptq-4b",
        "model": "tiny",
        "seed": 0,
        "outcome": "refused",
        "started": rich.started,
        "host": "0123456789ab",
        "name": rich.name,
        **dict.fromkeys(HEADLINES),
        "token_ppl": 12.5,
        "bits_per_weight": 4.25,
    }


def test_it_follows_the_folder(store, rich, monkeypatch):
    """Records come, go and are published; each is read once."""
    reads = []
    read = Reader.read_file
    monkeypatch.setattr(Reader, "read_file", lambda self, path: reads.append(path.name) or read(self, path))
    for seed in range(3):
        store.write(seeded(rich, seed))
    assert seeds(store) == [0, 1, 2] and len(reads) == 3
    assert seeds(store) == [0, 1, 2] and len(reads) == 3
    (store.folder("fakes", 1) / seeded(rich, 1).name).unlink()
    store.write(seeded(rich, 7))
    assert seeds(store) == [0, 2, 7] and len(reads) == 4
    publish_records([seeded(rich, 5)], store.results, "full")
    assert seeds(store) == [5] and reads[4:] == ["full.parquet"]
    publish_records([seeded(rich, 5), seeded(rich, 6)], store.results, "full")
    assert seeds(store) == [5, 6] and len(reads) == 6


def test_suites_are_apart(store, rich):
    store.write(rich)
    store.write(seeded(rich, 3, suite="others", suite_version=2))
    assert (seeds(store), seeds(store, "others"), seeds(store, "fakes")) == ([0, 3], [3], [0])


@pytest.mark.parametrize("harm", ["gone", "damaged", "of another form", "a folder"])
def test_an_index_that_is_no_good_is_made_anew(store, rich, harm, tmp_path):
    store.write(rich)
    assert seeds(store) == [0]
    (kept,) = (store.results / module.FOLDER).glob("*.parquet")
    if harm == "of another form":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"file": [rich.name]}), kept)
    else:
        kept.write_bytes(b"PAR1") if harm == "damaged" else kept.unlink()
        if harm == "a folder":
            kept.mkdir()
    assert seeds(store) == [0]


def test_what_cannot_be_read_is_named_every_time(store, rich):
    store.write(rich)
    stray = store.folder("fakes", 1) / "stray.json"
    stray.write_text("no record")
    for _ in range(2):
        rows, (note,) = list_records(store.results, {})
        assert len(rows) == 1 and str(stray) in note


def test_git_does_not_see_it(store, rich):
    subprocess.run(["git", "init", "-q", store.results], check=True)
    store.write(rich)
    store.index()
    status = ["git", "-C", store.results, "status", "--porcelain", "--untracked-files=all"]
    seen = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    assert "records/" in seen and module.FOLDER not in seen


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, [0, 1, 2]),
        ({"recipe": "gptq*"}, [0, 1]),
        ({"recipe": "gptq(bits=4)"}, [0, 1]),
        ({"recipe": "rtn"}, [2]),
        ({"outcome": "ok"}, []),
        ({"outcome": "refused", "recipe": "*-4b"}, [0, 1]),
        ({"suite": "fakes"}, [0, 1, 2]),
    ],
)
def test_filters(store, rich, filters, found):
    for record in (rich, seeded(rich, 1), seeded(rich, 2, recipe="rtn", steps="rtn()")):
        store.write(record)
    assert [row["seed"] for row in list_records(store.results, filters)[0]] == found


@pytest.mark.parametrize(
    ("filters", "words"),
    [({"suite": "fake"}, "did you mean 'fakes'"), ({"outcome": "fine"}, "unknown outcome 'fine'")],
)
def test_unknown_names_are_usage(store, rich, filters, words):
    store.write(rich)
    with pytest.raises(Usage, match=words):
        list_records(store.results, filters)


def test_the_command_lists_records(store, rich):
    store.write(rich)
    done = subprocess.run(
        [sys.executable, "-m", "effbench", "list", "records", f"results={store.results}", "recipe=gptq*"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "gptq-4b" in done.stdout and "12.5" in done.stdout
