"""`effbench replay` on the command line: its words, its exit codes, and what is left behind."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest

from effbench.cells import local as executors
from effbench.cli import main as cli
from effbench.cli.commands.replay import write_verdict
from effbench.core.paths import PUBLISHED
from effbench.records.find import find_record
from effbench.report.replay import judge_replay

LIGHT = ("effbench.cells.local", "torch", "effbench.machine.peak")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working folder with records of cells that measure nothing, and the file of one of them."""
    monkeypatch.chdir(tmp_path)
    fake = functools.partial(executors.Local, execute="fake_cells:quick", preload=LIGHT)
    monkeypatch.setattr(executors, "Local", fake)
    assert cli.main(["run", "recipe=rtn(bits=8)", "device=cpu", "probes=cost"]) == 0
    (path,) = Path("runs/records/adhoc/v1").glob("rtn*.json")
    return path


def replay(*arguments):
    return cli.main(["replay", *arguments])


def plant(path, change):
    """The record of a file with a planted change, in a file of its own."""
    body = json.loads(path.read_text())
    body |= {"environment": {"machine": "none"}, "samples": {}, "protocols": {"length": "characters of the row's name"}}
    change(body)
    other = path.parent / "planted.json"
    other.write_text(json.dumps(body))
    return str(other)


def test_a_replay_reproduces_and_is_kept_each_time(own, capsys):
    for attempt in (1, 2):
        capsys.readouterr()
        assert replay("adhoc/rtn(bits=8)", "results=runs") == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("record ") and "adhoc/rtn(bits=8) v1, quick tier, model tiny, seed 0" in lines[0]
        assert lines[-1] == "reproduced"
        assert "quality: 1 of 1 metrics reproduce, 1 to the last bit over 0 items" in lines
        assert len(list(Path("runs/replays/records/adhoc/v1").glob("rtn*.json"))) == attempt
    assert len(list(Path("runs/records/adhoc/v1").glob("rtn*.json"))) == 1  # own records are left alone


def test_a_drift_is_told_with_what_differs(own, capsys):
    def change(body):
        body["metrics"]["length"] = [7.0, 6.5, 7.5]
        body["environment"] |= {"packages": {"torch": "1.0"}}

    planted = plant(own, change)
    assert replay(planted) == 1
    out = capsys.readouterr().out
    assert "  length: 11.0000 now, 7.00000 then, +57 %, outside its 95 % interval 6.500 to 7.500" in out
    assert "what is different here:\n  torch: none now, 1.0 then" in out and out.endswith("\ndrifted\n")
    assert replay(planted, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["drifts"][0]["metric"], told["drifts"][0]["after"]) == ("drifted", "length", 11.0)
    assert told["differences"] == ["torch: none now, 1.0 then"]


def test_what_cannot_run_has_a_code_of_its_own(own, capsys):
    def change(body):
        body["cell"]["resolved"][0]["method"] = "gone"

    assert replay(plant(own, change)) == 3
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("cannot run: unknown method 'gone'") and not err
    assert not Path("runs/replays").exists()


def test_a_cell_that_does_not_end_here_cannot_run(own, monkeypatch, capsys):
    fake = functools.partial(executors.Local, execute="fake_cells:unluckily", preload=LIGHT)
    monkeypatch.setattr(executors, "Local", fake)
    assert replay(str(own)) == 1
    assert "drifted: crashed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: record"),
        (["tier=quick"], "'tier=quick' is an option: name a record before it, `effbench replay RECORD`"),
        (["data/dsir"], "did you mean 'data/"),
        (["quant/gptq-4b"], "have this name; add tier="),
        (["data/dsir-100steps", "seed=-1"], "seed=-1: must be a whole number"),
        (["data/dsir-100steps", "sede=1"], "unknown option 'sede'; did you mean 'seed'?"),
        (["data/dsir-100steps", f"runs={PUBLISHED}"], "holds what is published; choose another folder"),
        (["README.md", "timeout=0"], "timeout=0: must be a number above 0"),
        (["planted.json"], "fields do not fit the schema"),
        (["planted.json", "seed=1"], "seed= chooses among records of one name"),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("planted.json").write_text('{"schema": 3, "cell": 1}')
    assert replay(*arguments) == 2
    out, err = capsys.readouterr()
    assert words in err and len(err.splitlines()) == 1 and not out
    assert not Path("runs").exists()


def test_the_help_names_the_exit_codes(capsys):
    assert replay("--help") == 0
    assert "0 reproduced, 1 drifted, 2 wrong usage, 3 cannot run" in capsys.readouterr().out


def test_the_example_of_the_page_is_what_the_published_record_says():
    """Its figures are those of the record, as a replay to the last bit tells them."""
    record = find_record("data/dsir-100steps", PUBLISHED)
    page = (PUBLISHED.parent / "docs" / "reproduce.md").read_text(encoding="utf-8")
    assert "\n".join(write_verdict(judge_replay(record, record))) in page


def test_the_record_of_the_readme_takes_less_than_a_minute():
    readme = (PUBLISHED.parent / "README.md").read_text(encoding="utf-8")
    (name,) = re.findall(r"\.venv/bin/effbench replay (\S+)$", readme, re.MULTILINE)
    assert find_record(name, PUBLISHED).seconds < 30  # libraries are loaded in as much
