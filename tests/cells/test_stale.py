"""Whether a record is of the present source."""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from effbench import sources
from effbench.cells import stale
from effbench.cells.plan import digests
from effbench.cells.stale import is_stale
from effbench.core.kinds import kind_of
from effbench.core.recipe import parse
from effbench.core.registry import catalog, entry, load
from effbench.records.record import Cell, Record
from effbench.records.store import Store

PROBES = ["cost", "quality"]


def plan(steps):
    recipe = parse(steps)
    present = digests(recipe, PROBES, sources.model("tiny").digest, sources.data(None).digest)
    cell = Cell(
        "quant", 1, "quick", "g", str(recipe), tuple(recipe.resolved()), "tiny", "tiny", 0, {"probes": PROBES}, present
    )
    return Record(cell, "ok")


@pytest.fixture
def record():
    return plan("gptq(bits=3)")


def changed(record, **changes):
    return dataclasses.replace(record, cell=dataclasses.replace(record.cell, **changes))


def test_what_was_just_planned_is_not_stale(record):
    assert not is_stale(record)


def test_methods_that_a_step_takes_are_its_own_too():
    record = plan("active_learning(acquire='entropy()')")
    assert not is_stale(record)
    for name in ("method.active_learning", "method.entropy"):
        assert is_stale(changed(record, digests=record.cell.digests | {name: "0"}))
    assert is_stale(changed(record, digests=record.cell.digests | {"method.gone": "0"}))


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


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working folder with a model, its tokenizer, a GGUF file and texts; `record_of` measures on them."""
    monkeypatch.chdir(tmp_path)
    stale._digest_source.cache_clear()
    for name in ("mine", "words", "tiny"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
    (tmp_path / "q4.gguf").write_text("weights")
    monkeypatch.setattr(sources, "_find_lacking_reader", lambda: "")
    for name in ("wiki", "code: a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"A text of {name}.")
    (tmp_path / "pairs.jsonl").write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(4)))
    return tmp_path


OWN_SOURCES = [
    ({"name": "mine"}, {"name": None}, "mine/config.json"),
    ({"name": "./tiny"}, {"name": None}, "tiny/config.json"),
    ({"name": "tiny", "tokenizer": "words"}, {"name": None}, "words/config.json"),
    ({"name": "mine", "tokenizer": "words"}, {"name": None}, "mine/config.json"),
    ({"name": "gguf:q4.gguf"}, {"name": None}, "q4.gguf"),
    ({"name": "tiny"}, {"name": "text:wiki"}, "wiki/a.txt"),
    ({"name": "tiny"}, {"name": "text:code: a"}, "code: a/a.txt"),
    ({"name": "tiny"}, {"name": "jsonl:pairs.jsonl"}, "pairs.jsonl"),
    ({"name": "tiny"}, {"name": "tiny", "learned": "text:wiki"}, "wiki/a.txt"),
    ({"name": "tiny"}, {"name": "text:code: a", "learned": "jsonl:pairs.jsonl"}, "pairs.jsonl"),
    ({"name": "mine"}, {"name": "hub:org/name", "learned": "speeches"}, "mine/config.json"),
]


def record_of(record, model, data):
    model, data = sources.model(**model), sources.data(**data)
    digests = record.cell.digests | {"model": model.digest, "data": data.digest}
    return changed(record, model=model.name, data=data.shown, digests=digests)


@pytest.mark.parametrize(("model", "data", "file"), OWN_SOURCES)
def test_own_models_and_data_are_looked_up_by_what_can_be_opened(record, own, monkeypatch, model, data, file):
    made = record_of(record, model, data)
    assert not is_stale(made)
    assert is_stale(changed(made, digests=made.cell.digests | {"probe.quality": "0"}))
    (own / file).write_text('{"text": "other"}\n{"text": "words"}\n{"text": "now"}\n')
    stale._digest_source.cache_clear()
    assert is_stale(made)


@pytest.mark.parametrize(("model", "data", "file"), OWN_SOURCES)
def test_what_lies_elsewhere_is_taken_as_the_record_says(record, own, monkeypatch, model, data, file):
    made = record_of(record, model, data)
    (own / "elsewhere").mkdir()
    monkeypatch.chdir(own / "elsewhere")
    assert not is_stale(made)
    assert is_stale(changed(made, digests=made.cell.digests | {"open": "0"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "org/name@deadbeef"},
        {"data": "hub:name@deadbeef"},
        {"model": "shape:none@deadbeef"},
        {"data": "text:a"},
    ],
)
def test_names_that_look_alike_are_no_folders(record, changes):
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
