"""What is published: whole, small, and nothing in it that nobody needs."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from effbench.cells.plan import choose_probes
from effbench.core.paths import PACKAGE
from effbench.core.recipe import parse
from effbench.records import files, packed, shared
from effbench.records.store import Store, latest
from effbench.report.groups import group_records

RESULTS = PACKAGE.parent / "results"
BUDGET = 1_000_000  # bytes of one suite, tables included
STORE = Store(RESULTS)


@pytest.fixture(scope="module")
def published():
    records, notes = STORE.read()
    assert notes == []
    return records


def suites():
    return sorted({folder.parent.name for folder in STORE.folders()})


def size_of(suite):
    """Bytes of everything that a suite has in the results folder."""
    paths = [*RESULTS.glob(f"*/{suite}/**/*"), *RESULTS.glob(f"*/{suite}.*")]
    return sum(path.stat().st_size for path in paths if path.is_file())


@pytest.mark.parametrize("suite", suites())
def test_a_suite_stays_within_its_budget(suite):
    assert size_of(suite) <= BUDGET


def test_the_size_of_a_suite_is_that_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.RESULTS", tmp_path)
    for name, size in {
        "records/a/v1/x": 5,
        "samples/a/v2/y": 7,
        "tables/a.md": 11,
        "tables/b.md": 13,
        "x/a.json": 2,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"." * size)
    assert size_of("a") == 25


def test_every_record_is_part_of_a_publication():
    loose = [path for folder in STORE.folders() for path in folder.iterdir() if path.suffix != packed.SUFFIX]
    assert {path.name for path in loose} == {shared.PROTOCOLS}
    assert not list(RESULTS.glob("samples/**/*.json.gz"))


def test_no_record_is_superseded(published):
    assert len(latest(published)) == len(published)
    assert [group.older for group in group_records(published)] == [0] * len(group_records(published))


def test_one_table_for_a_tier_on_a_machine(published):
    """Tables of one name would differ in something that their captions do not say."""
    cells = [(group.records[0].cell, group.records[0].host) for group in group_records(published)]
    names = Counter((c.suite, c.suite_version, c.tier, c.model, c.settings["machine"], host) for c, host in cells)
    assert max(names.values()) == 1


def test_records_are_complete(published):
    for record in published:
        assert record.environment["machine"] and record.host
        assert record.metrics.keys() == record.protocols.keys()
        timed = any(name.startswith("prefill_seconds") for name in record.samples)
        taken = choose_probes(record.cell.settings["probes"], parse(record.cell.steps), crowded=False)
        assert timed == ("speed" in taken)


def test_what_is_shared_is_referred_to(published):
    kept = {path.stem for path in (STORE.records / shared.ENVIRONMENTS).iterdir()}
    assert kept == {files.digest(files.canonical(record.environment)) for record in published}
    for folder in STORE.folders():
        protocols = shared.read_protocols(folder)
        used = {text for chosen in protocols.sets.values() for text in chosen.values()}
        assert used == protocols.texts.keys()


def test_protocols_hold_neither_recipes_nor_findings(published):
    for record in published:
        steps = [step["step"] for step in record.log["steps"]]
        for text in record.protocols.values():
            assert not any(step in text for step in steps)
            assert not re.search(r"warm-up|rounds|% wide|\d+ compressed", text)
