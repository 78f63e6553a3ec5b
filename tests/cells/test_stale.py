"""Whether a record is of the present source."""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from effbench import sources
from effbench.cells.plan import digests
from effbench.cells.stale import is_stale
from effbench.core.kinds import kind_of
from effbench.core.recipe import parse
from effbench.core.registry import catalog, entry, load
from effbench.records.record import Cell, Record
from effbench.records.store import Store

PROBES = ["cost", "quality"]


@pytest.fixture
def record():
    recipe = parse("gptq(bits=3)")
    present = digests(recipe, PROBES, sources.model("tiny").digest, sources.data(None).digest)
    cell = Cell(
        "quant", 1, "quick", "g", str(recipe), tuple(recipe.resolved()), "tiny", "tiny", 0, {"probes": PROBES}, present
    )
    return Record(cell, "ok")


def changed(record, **changes):
    return dataclasses.replace(record, cell=dataclasses.replace(record.cell, **changes))


def test_what_was_just_planned_is_not_stale(record):
    assert not is_stale(record)


@pytest.mark.parametrize("name", ["model", "data", "tasks", "open", "probe.quality", "method.gptq"])
def test_any_other_digest_is_stale(record, name):
    assert name in record.cell.digests
    assert is_stale(changed(record, digests=record.cell.digests | {name: "0"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"resolved": ({"method": "gone"},)}, {"resolved": ({"bits": 3},)},
        {"model": "no/where/there"}, {"data": "text:no/where"},
        {"settings": {"probes": ["gone"]}}, {"settings": {}}, {"settings": {"probes": 3}},
    ],
)  # fmt: skip
def test_what_is_no_more_is_stale(record, changes):
    assert is_stale(changed(record, **changes))


def test_every_method_is_digested_as_it_is_planned():
    """Without being imported: what the file says of a method is what its class says."""
    for key in catalog():
        cls = load(key)
        assert (entry(key).module, entry(key).kind) == (cls.__module__, kind_of(cls))


def test_answering_imports_no_torch(record):
    code = (
        "import sys, pathlib; from effbench.cells.stale import is_stale; from effbench.records.store import Store\n"
        "(record,), _ = Store(pathlib.Path(sys.argv[1])).read(); assert not is_stale(record)\n"
        "assert 'torch' not in sys.modules"
    )
    with tempfile.TemporaryDirectory() as folder:
        Store(Path(folder)).write(record)
        subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=60)
