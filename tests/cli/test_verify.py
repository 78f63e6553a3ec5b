"""`effbench verify`: a number that was measured on the embedded model, planted as published, comes out as it should."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from effbench.cells import local as executors
from effbench.cells.execute import execute
from effbench.cells.local import Event
from effbench.cli import main as cli
from effbench.core.paths import PACKAGE
from effbench.records.store import Store

STEPS = "rtn(bits=3, granularity='channel')"
SETTINGS = ["--set", "window=64", "--set", "stride=64", "--set", "text_tokens=256", "probes=perplexity"]
TINY = PACKAGE / "tiny" / "model"


class InProcess(executors.Local):
    """Real cells, one after the other in this process: what is measured is the same, and starts at once."""

    def run(self, jobs, stop, find=lambda _: None):
        for job in jobs:
            yield Event(job, record=execute(job.at(job.places).entered(0)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A working folder whose runs have the cell, and its perplexity and that of the unchanged model."""
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(executors, "Local", InProcess)
        assert cli.main(["run", f"recipe={STEPS}", "device=cpu", "tier=full", *SETTINGS]) == 0
    values = {record.cell.steps: record.metrics["token_ppl"].value for record in Store(folder / "runs").read()[0]}
    return folder, values[STEPS], values[""]


@pytest.fixture
def here(measured, tmp_path, monkeypatch):
    """An empty working folder in which cells run in this process and the Hub has nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(executors, "Local", InProcess)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture
def plant(measured, here):
    """A paper file that states the measured number as published, with changes."""

    def do(factor=1.0005, *, protocol=(), models=None, **number):
        _, value, unchanged = measured
        body = {
            "source": "arXiv:0000.00000",
            "paper": "Nobody, 2026",
            "evidence": "authors",
            "protocols": {
                "heldout": {
                    "metric": "token_ppl", "data": "tiny", "dataset": "tiny", "split": "heldout", "join": "\n\n",
                    "tokens": 256, "window": 64, "stride": 64, **dict(protocol),
                }
            },
            "models": models or {},
            "numbers": [
                {
                    "name": "row", "method": "rtn", "model": "tiny", "protocol": "heldout", "table": "Table 1",
                    "value": value * factor, "tolerance": 0.001, "steps": STEPS, "unchanged": unchanged, **number,
                }
            ],
        }  # fmt: skip
        Path("mine.yaml").write_text(yaml.safe_dump(body))
        return "paper=mine.yaml"

    return do


def verify(*arguments):
    return cli.main(["verify", *arguments])


def last(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_a_planted_number_is_reproduced_and_not_run_twice(measured, plant, capsys):
    paper = plant()
    assert verify(paper, "device=cpu") == 0
    out = capsys.readouterr().out
    assert "[2/2]" in out and "mine/row: reproduced: " in out and "the unchanged model is off by +0" in out
    assert verify(paper, "device=cpu") == 0
    out = capsys.readouterr().out
    assert "[" not in out and out.startswith("mine/row: reproduced: ")
    assert verify(paper, "device=cpu", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["measured"]) == ("reproduced", measured[1])
    assert told["off"] == pytest.approx(measured[1] * -0.0005)


@pytest.mark.parametrize(("factor", "words"), [(1 / 1.1, "off by +"), (1.1, "off by -")])
def test_a_number_that_is_off_says_by_how_much(measured, plant, capsys, factor, words):
    runs = f"runs={measured[0] / 'runs'}"
    assert verify(plant(factor), "device=cpu", runs) == 1
    line = last(capsys)
    assert line.startswith(f"mine/row: {words}") and "more than 0.1 %" in line
    assert f"{measured[1]:.5g} here" in line


def test_the_unchanged_model_is_a_number_too(measured, plant, capsys):
    _, _, unchanged = measured
    runs = f"runs={measured[0] / 'runs'}"
    assert verify(plant(method="baseline", steps="", value=unchanged, unchanged=None), "device=cpu", runs) == 0
    assert "mine/row: reproduced" in last(capsys)


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ({"split": "test"}, "split 'test' of the paper, 'heldout' of tiny"),
        ({"dataset": "Salesforce/wikitext"}, "dataset 'Salesforce/wikitext' of the paper, 'tiny' of tiny"),
        ({"join": " "}, "join ' ' of the paper"),
        ({"tokens": None}, "all of the text in the paper, 16384 tokens of tiny"),
        ({"says": ["block1"]}, "which does not say 'block1'"),
    ],
)
def test_another_protocol_is_refused(measured, plant, capsys, protocol, words):
    assert verify(plant(protocol=protocol), "device=cpu", f"runs={measured[0] / 'runs'}") == 3
    line = last(capsys)
    assert line.startswith("mine/row: refused: another protocol: ") and words in line


def test_calibration_on_other_text_is_refused(plant, capsys):
    protocol = {"calibration": "C4 train"}
    assert verify(plant(method="gptq", steps="gptq(bits=3)", protocol=protocol), "device=cpu") == 3
    assert "refused: another protocol: calibration 'C4 train' of the paper, 'tiny calibration' of tiny" in last(capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": {"window": 128, "stride": 128}}, "stride 64, 128 of the paper; window 64, 128 of the paper"),
        ({"protocol": {"tokens": 128}}, "text_tokens 256, 128 of the paper"),
        ({"steps": "rtn(bits=2)"}, "recipe \"rtn(bits=3, granularity='channel')\", 'rtn(bits=2)' of the paper"),
        ({"model": "smollm2"}, "model tiny, smollm2 of the paper"),
        ({"protocol": {"data": "speeches", "dataset": "speeches"}}, "data tiny, speeches of the paper"),
        ({"settings": {"limit": 2}}, "limit by default, 2 of the paper"),
    ],
)
def test_a_record_of_another_protocol_is_refused(measured, plant, capsys, monkeypatch, changes, words):
    monkeypatch.setenv("EFFBENCH_CACHE", "nowhere")
    folder = measured[0]
    paper = plant(**changes)
    assert verify(paper, f"record=adhoc/{STEPS}", f"runs={folder / 'runs'}") == 3
    line = last(capsys)
    assert line.startswith("mine/row: refused: another protocol: ") and words in line


def test_a_record_of_the_paper_s_protocol_is_judged(measured, plant, capsys):
    runs = f"runs={measured[0] / 'runs'}"
    assert verify(plant(), f"record=adhoc/{STEPS}", runs) == 0
    assert last(capsys).startswith("mine/row: reproduced: ")
    assert verify(plant(2.0), f"record=adhoc/{STEPS}", runs) == 1


def test_a_model_that_is_not_at_hand_is_named(plant, capsys):
    assert verify(plant(model="nobody/nothing-1b"), "device=cpu") == 3
    assert last(capsys) == "mine/row: cannot run: needs nobody/nothing-1b, in the Hub's cache or at model=PATH"
    assert not Path("runs").exists()


def test_a_folder_stands_for_a_model_if_its_configuration_is_the_same(measured, plant, capsys):
    config = json.loads((TINY / "config.json").read_text())
    shutil.copytree(TINY, "copy")
    facts = {name: config[name] for name in ("hidden_size", "num_hidden_layers")}
    paper = plant(model="nobody/nothing-1b", models={"nobody/nothing-1b": facts})
    assert verify(paper, "device=cpu", "model=copy") == 0
    assert last(capsys).startswith("mine/row: reproduced: ")
    other = plant(model="nobody/nothing-1b", models={"nobody/nothing-1b": facts | {"hidden_size": 4096}})
    assert verify(other, "device=cpu", "model=copy") == 3
    words = f"refused: another model: hidden_size {config['hidden_size']} of copy@"
    assert words in (line := last(capsys)) and line.endswith("4096 of nobody/nothing-1b")


def test_a_model_in_the_hub_s_cache_is_read_from_there(plant, capsys, monkeypatch):
    """Nothing is asked for on the network."""
    commit = "a" * 40
    model = Path("hub/models--nobody--nothing-1b")
    folder = model / "snapshots" / commit
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    shutil.copyfile(TINY / "config.json", folder / "config.json")
    paper = plant(model="nobody/nothing-1b")
    assert verify(paper, "device=cpu") == 3
    assert "the Hub's cache has its config.json, and no safetensors" in last(capsys)
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    monkeypatch.setattr(socket.socket, "connect", None)
    assert verify(paper, "device=cpu") == 0
    assert last(capsys).startswith("mine/row: reproduced: ")
    assert verify(paper, "device=cpu", f"record=adhoc/{STEPS}") == 0  # whose model is known by its content


def test_what_the_model_is_too_short_for_cannot_run(plant, capsys):
    assert verify(plant(protocol={"window": 4096, "stride": 4096, "tokens": 8192}), "device=cpu") == 3
    assert "cannot run: window takes 4096 tokens, and the model tiny has 2048" in last(capsys)


def test_what_effbench_lacks_is_said(plant, capsys):
    assert verify(plant(lacks="a telescope"), "device=cpu") == 3
    assert last(capsys) == "mine/row: cannot run: effbench lacks a telescope"


def test_the_list_runs_nothing_and_knows_what_was_measured(measured, here, capsys):
    assert verify() == 0
    header, *lines, summary = capsys.readouterr().out.splitlines()
    assert header.split() == ["number", "of", "where", "published", "state"]
    assert any("arXiv:2210.17323, Table 3" in line and "needs facebook/opt-125m" in line for line in lines)
    assert summary.startswith(f"{len(lines)} numbers: ") and "`effbench verify --without` says why" in summary
    assert not Path("runs").exists()
    assert verify("--without") == 0
    assert any(line.split()[0] == "kd" for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["paper=gptk"], "unknown paper 'gptk'; did you mean 'gptq'"),
        (["paper=gone.yaml"], "paper=gone.yaml: no such file"),
        (["paper=bad.yaml"], "bad.yaml: line 1"),
        (["papr=gptq"], "unknown option 'papr'; did you mean 'paper'?"),
        (["paper=gptq", "entries=opt-125"], "entries=opt-125: none is called 'opt-125'; did you mean 'opt-125m'"),
        (["method=gptk"], "method=gptk: no number of it is known; did you mean 'gptq'"),
        (["method=kd"], "method=kd: no number of it is known: TextBrewer"),
        (["paper=gptq", "model=tiny"], "the numbers are of facebook/opt-1.3b, facebook/opt-125m, facebook/opt-350m"),
        (["paper=gptq", "record=x"], "record= is held against one number, and there are 15"),
        (["paper=gptq", "entries=opt-125m", "record=x"], "there are no records in"),
        (["paper=gptq", "entries=opt-125m", "model=nowhere"], "model=nowhere: no such folder"),
        (["model=tiny"], "model= and record= are for numbers that are named"),
        (["paper=gptq", "dtype=int4"], "unknown dtype 'int4'"),
    ],
)
def test_wrong_usage_is_one_line(here, capsys, arguments, words):
    Path("bad.yaml").write_text("numbers: [")
    assert verify(*arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and len(err.splitlines()) == 1 and not out
