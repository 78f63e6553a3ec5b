"""The command line: what it prints, how it ends, and that wrong usage costs one line and nothing else."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from effbench import sources
from effbench.cells import local as executors
from effbench.cells import plan as runner
from effbench.cells import run as batches
from effbench.cells.options import RunOptions
from effbench.cli import main as cli
from effbench.core import registry
from effbench.core.paths import PACKAGE, PUBLISHED
from effbench.nn.files.load import open_model
from effbench.records.store import Store, latest

LIGHT = ("effbench.cells.local", "torch", "effbench.machine.peak")


@pytest.fixture
def fakes(monkeypatch):
    """`effbench run` with cells that measure nothing."""

    def use(name="quick"):
        local = functools.partial(executors.Local, execute=f"fake_cells:{name}", preload=LIGHT)
        monkeypatch.setattr(executors, "Local", local)

    use()
    return use


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return cli.main(["run", "device=cpu", *arguments])


# ---- wrong usage ----

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["run"], "give suite=NAME, recipe='step(), step()' or both"),
        (["run", "suite=quant", "recipe=rtm()"], "unknown method 'rtm'; did you mean 'rtn'?"),
        (["run", "suite=./quan.yaml"], "suite=./quan.yaml: no such file"),
        (
            ["run", "suite=quant", "results=" + str(PUBLISHED)],
            "holds what is published; choose another folder, as runs",
        ),
        (["run", "suite=quant", "--set", "windw=3"], "unknown setting 'windw'; did you mean 'window'?"),
        (["run", "suite=quant", "--set", "window"], "write window=VALUE"),
        (["run", "suite=quant", "--set", "window=1"], "window=1: must be a whole number from 2 up"),
        (["run", "suite=quant", "--set", "window=9", "--set", "window=9"], "setting window is given twice"),
        (["run", "suite=quant", "--set", "window=9999"], "window takes 9999 tokens, and the model tiny has 2048"),
        (["run", "suite=quant", "--set", "tasks=[]"], "tasks=[]: must be a list in brackets, each item text"),
        (["run", "suite=quant", "--set", "limit=9", "limit=9"], "limit is given twice"),
        (["run", "suite=quant", "--set", "seeds=[1]", "seeds=[1]"], "option seeds is given twice"),
        (["run", "suite=quant", "--set", "tasks=tiny"], "tasks=tiny: must be a list in brackets, each item text"),
        (["run", "suite=quant", "--set", "speed_points=[[1]]"], "each item a list in brackets"),
        (["run", "suite=quant", "--set", "probes=[spead]"], "unknown probe 'spead'; did you mean 'speed'?"),
        (["run", "suite=quan"], "unknown suite 'quan'; did you mean 'quant'?"),
        (["run", "recipe=rtm()"], "unknown method 'rtm'; did you mean 'rtn'?"),
        (["run", "recipe=rtn(bit=4)"], "no parameter 'bit'; did you mean 'bits'?"),
        (["run", "recipe=rtn(bits='4')"], "rtn.bits='4': must be a whole number, not str"),
        (["run", "recipe=rtn(bits=5)"], "bits must be one of"),
        (["run", "recipe=rtn(bits=True)"], "must be a whole number, not bool"),
        (["run", "recipe=rtn(4)"], "arguments must be named"),
        (["run", "recipe=rtn(bits=4, bits=8)"], "bits is given twice"),
        (["run", "recipe=rtn(bits=open('x'))"], "is not a literal; it must be a whole number"),
        (["run", "recipe=rtn(granularity=tensor)"], "granularity=tensor is not a literal; write granularity='tensor'"),
        (["run", "recipe=rtn(granularity=tenser)"], "it must be one of 'tensor', 'channel', 'group'"),
        (["run", "recipe=rtn"], "write rtn()"),
        (["run", "recipe=rtn("], "cannot be read"),
        (["run", "recipe=  "], "name at least one step"),
        (["run", "recipe=low_precision(), high_precision()"], "Conflict: train.precision is already set by low_prec"),
        (["run", "suite=twice.yaml"], "two recipes are called 'row'"),
        (["run", "suite=quant", "sedes=[0]"], "unknown option 'sedes'; did you mean 'seeds'?"),
        (["run", "suite=quant", "--jason"], "unrecognized arguments: --jason"),
        (["run", "suite=quant", "quick"], "unexpected 'quick': options are written key=value"),
        (["run", "suite=quant", "limit"], "write limit=VALUE"),
        (["run", "suite=quant", "limit="], "write limit=VALUE"),
        (["run", "suite=quant", "limit=1", "limit=2"], "option limit is given twice"),
        (["run", "suite=quant", "limit=0"], "limit=0: must be a whole number from 1 up"),
        (["run", "suite=quant", "limit=-3"], "limit=-3: must be a whole number from 1 up"),
        (["run", "suite=quant", "limit=ten"], "limit=ten: must be a whole number"),
        (["run", "suite=quant", "limit=2.5"], "limit=2.5: must be a whole number"),
        (["run", "suite=quant", "limit=0x10"], "limit=0x10: must be a whole number"),
        (["run", "suite=quant", "limit=0o10"], "limit=0o10: must be a whole number"),
        (["run", "suite=quant", "limit=1_000"], "limit=1_000: must be a whole number"),
        (["run", "suite=quant", "limit=1:30"], "limit=1:30: must be a whole number"),
        (["run", "suite=quant", "limit=1e3"], "limit=1e3: must be a whole number"),
        (["run", "suite=quant", "limit=?"], "limit=?: must be a whole number"),
        (["run", "suite=quant", "jobs=${x}"], "jobs=${x}: must be a whole number"),
        (["run", "suite=quant", "seeds={}"], "seeds={}: must be a list in brackets"),
        (["run", "suite=quant", "seeds=[[0]]"], "seeds=[[0]]: must be a list in brackets"),
        (["run", "suite=quant", "seeds=[4294967296]"], "each item a whole number from 0 to 4294967295"),
        (["run", "suite=quant", "timeout=1e999"], "timeout=1e999: must be a number above 0"),
        (["run", "suite=quant", "timeout=1:30"], "timeout=1:30: must be a number above 0"),
        (["run", "suite=quant", "jobs=0"], "jobs=0: must be a whole number from 1 up"),
        (["run", "suite=quant", "threads=0"], "threads=0: must be a whole number from 1 up"),
        (["run", "suite=quant", "timeout=.nan"], "timeout=.nan: must be a number above 0"),
        (["run", "suite=quant", "timeout=soon"], "timeout=soon: must be a number"),
        (["run", "suite=quant", "seeds=[]"], "seeds=[]: name at least one seed"),
        (["run", "suite=quant", "seeds=3"], "seeds=3: must be a list in brackets"),
        (["run", "suite=quant", "seeds=[0,0]"], "must be different whole numbers"),
        (["run", "suite=quant", "seeds=[0"], "seeds=[0: must be a list"),
        (["run", "suite=quant", "tier=fast"], "unknown tier 'fast'"),
        (["run", "suite=quant", "dtype=int4"], "unknown dtype 'int4'"),
        (["run", "suite=quant", "executor=local"], "unknown option 'executor'"),
        (["run", "suite=quant", "device=gpu"], "device=gpu: must be cpu, cuda or cuda:N"),
        (["run", "suite=quant", "device=tpu"], "device=tpu: must be cpu, cuda or cuda:N"),
        (["run", "suite=quant", "device=cuda:77"], "device=cuda:77: this machine has"),
        (["run", "suite=quant", "device=cuda:\u00b2"], "must be cpu, cuda or cuda:N"),
        (["run", "suite=quant", "device=cuda:x"], "device=cuda:x: must be cpu, cuda or cuda:N"),
        pytest.param(
            ["run", "suite=quant", "device=cuda"], "device=cuda: this machine has no CUDA device", marks=needs_no_gpu
        ),
        (["run", "suite=quant", "recipes=gtpq*"], "no row of quant in tier quick matches 'gtpq*'"),
        (["run", "recipe=rtn()", "recipes=rtn"], "recipes= chooses rows of a suite"),
        (["run", "suite=quant", "model=nowhere"], "model=nowhere: no such folder"),
        (["run", "suite=quant", "model=./no/where"], "model=./no/where: no such folder"),
        (["run", "suite=quant", "model=folder"], "model=folder: the folder has no config.json"),
        (["run", "suite=quant", "model=shape:llama-9b"], "unknown shape 'llama-9b'; did you mean"),
        (["run", "suite=quant", "tokenizer=nowhere"], "tokenizer=nowhere: no such folder"),
        (["run", "suite=quant", "data=text:nowhere"], "data=text:nowhere: no such folder"),
        (["run", "suite=quant", "data=text:folder"], "data=text:folder: holds no text; text files end in .md"),
        (["run", "suite=quant", "probes=speed,enrgy"], "unknown probe 'enrgy'; did you mean 'energy'?"),
        (
            ["run", "suite=quant", "data=wiki"],
            "data=wiki: must be tiny, tiny:task, tiny:questions, tiny:planted, speeches, speeches:presidents, "
            "speeches:questions, text:FOLDER, ",
        ),
        (["run", "suite=quant", "results=twice.yaml/results"], "cannot write there"),
        (["run", "suite=quant", "results=/proc/results"], "cannot write there"),
        (["run", "suite=quant", "results=" + "a" * 5000], "File name too long"),
        (["run", "suite=quant", "results=a\0b"], "must be text"),
        (["run", "suite=quant", "results=~nobody_of_this_name/x"], "Could not determine home directory"),
        (["run", "suite=quant", "model=" + "a" * 5000], "File name too long"),
        (["run", "suite=quant", "data=text:" + "a" * 5000], "File name too long"),
        (["run", "suite=quant", "tokenizer=" + "a" * 5000], "File name too long"),
        (["run", "suite=" + "a" * 5000 + ".yaml"], "File name too long"),
        (["run", "suite=../quant"], "unknown suite '../quant'"),
        (["list", "method"], "cannot list 'method'; did you mean 'methods'?"),
        (["show", "gptqq"], "unknown name 'gptqq'; did you mean 'gptq'?"),
        (["show"], "required: name"),
        (["report", "suite=quant"], "no records"),
        (["report", "fromat=md"], "unknown option 'fromat'; did you mean 'format'?"),
        (["compare", "a"], "required: b"),
    ],
)
def test_wrong_usage(arguments, words, here, faults, capfd):
    (here / "folder").mkdir()
    rows = [{"name": "row", "steps": "rtn()"}, {"name": "row", "steps": "nf4()"}]
    twice = {"name": "twice", "version": 1, "description": "", "recipes": rows, "tiers": {"quick": {}}}
    (here / "twice.yaml").write_text(yaml.safe_dump(twice))
    before = sorted(here.rglob("*"))

    device = [] if any("device" in word for word in arguments) or arguments[0] != "run" else ["device=cpu"]
    assert cli.main([*arguments, *device]) == 2

    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("effbench: ") and err.count("\n") == 1 and err.endswith("\n")
    assert words in err
    assert sorted(here.rglob("*")) == before, "something was written"


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)


def test_wrong_usage_from_outside(here):
    done = python("-m", "effbench", "run", "suite=quant", "limit=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "effbench: limit=0: must be a whole number from 1 up\n"


# ---- list and show ----


def test_listing_imports_no_torch():
    code = (
        "import sys; from effbench.cli.main import main; code = main(['list']);"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'numpy', 'pandas')))"
    )
    assert python("-c", code).returncode == 0


def measure_processor_time(*arguments):
    """Seconds of the processor that a Python of its own takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert python(*arguments).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_listing_is_quick():
    """Within 0.3 s of the processor's time, where parsing three modules of Python's own takes 0.1 s; on a slower one
    longer."""
    parse = "import argparse, ast, typing\nfor one in (argparse, ast, typing): ast.parse(open(one.__file__).read())"
    times, yardsticks = [], []
    for _ in range(8):  # in turns, so that both see the same machine
        times.append(measure_processor_time("-m", "effbench", "list"))
        yardsticks.append(measure_processor_time("-c", parse))
    assert 0 < min(times) < 0.3 * max(1.0, min(yardsticks) / 0.1)


def test_list_methods(capsys):
    assert cli.main(["list", "methods", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    for key in ("rtn", "gptq", "awq", "quip_sharp", "nf4", "squeezellm", "fp8_weight"):
        assert rows[key]["family"] == "quant" and rows[key]["kind"] == "Weights"
        assert rows[key]["paper"].startswith("arXiv:")


@pytest.mark.parametrize("what", ["methods", "suites", "models", "ops", "tasks"])
def test_listings(what, capsys):
    assert cli.main(["list", what]) == 0
    text = capsys.readouterr().out
    assert cli.main(["list", what, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(text.splitlines()) - 1 > 0


def test_show_a_method(capsys, here):
    assert cli.main(["show", "gptq"]) == 0
    text = capsys.readouterr().out
    assert "arXiv:2210.17323" in text and "act_order" in text and "tests/" in text
    assert cli.main(["show", "gptq", "results=none", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    bits = {"type": "int", "default": "4", "comment": "2, 3, 4 or 8"}
    assert facts["parameters"]["bits"] == bits and facts["measured"] == []


def test_every_default_that_is_shown_is_the_fields_own_and_every_comment_is_whole(capsys, here):
    """A default is as a recipe has it, and of the lines of comment below a field none is lost."""
    for key, entry in registry.catalog().items():
        cls, shown = registry.load(key), entry.parameters
        fields = {field.name: field for field in dataclasses.fields(cls)}
        assert shown.keys() == fields.keys()
        for name, field in fields.items():
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is dataclasses.MISSING:
                assert shown[name].default is None
                continue
            read = ast.literal_eval(shown[name].default)
            assert (read, type(read)) == (default, type(default)), (key, name)
        said = " ".join(parameter.comment for parameter in shown.values())
        for owner in cls.__mro__:
            written = [f"    {name}: " for name in vars(owner).get("__annotations__", {}) if name in fields]
            lines = inspect.getsource(owner).splitlines() if written else []
            places = [place for place, line in enumerate(lines) if line.startswith(tuple(written))]
            for place in places:
                below = itertools.takewhile(lambda line: line.startswith("    #"), lines[place + 1 :])
                assert all(line.strip(" #") in said for line in below), (key, lines[place])
    assert cli.main(["show", "perplexity_filter", "results=none"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  reference +'target' +str +whose .* or the role of a model: .* gave$", text, re.MULTILINE)
    assert re.search(r"^  high +33\.333333333333336 +float ", text, re.MULTILINE)


@pytest.mark.parametrize("place", [".", "docs", "/", "elsewhere"])
def test_show_names_files_that_are_there(place, capsys, tmp_path, monkeypatch):
    """From the working folder inside the checkout, as whole paths outside of it."""
    checkout = PACKAGE.parent
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / place if place == "elsewhere" else checkout / place
    monkeypatch.chdir(folder)
    for name in ("gptq", str(PACKAGE / "cli" / "templates" / "swap.py")):
        assert cli.main(["show", name, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        for path in (facts["file"], *facts["tests"]):
            assert (folder / path).is_file()
            assert path.startswith("/") == (place in ("/", "elsewhere")), path
    assert cli.main(["show", "gptq"]) == 0  # of what is published, wherever one is
    text = capsys.readouterr().out
    assert PUBLISHED is None or not PUBLISHED.is_dir() or "\nmeasured, the newest 12" in text
    assert cli.main(["show", "gptq", f"results={tmp_path / 'none'}"]) == 0
    assert capsys.readouterr().out.endswith(f"\nnot measured yet in {tmp_path / 'none'}\n")


def test_show_names_an_own_file_from_the_folder_above_it(capsys, here):
    (here / "own").mkdir()
    template = (PACKAGE / "cli" / "templates" / "swap.py").read_text()
    (here / "own" / "mine.py").write_text(template)
    assert cli.main(["show", "own/mine.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "own/mine.py"


def test_show_tells_the_published_recipe_and_the_caveats(capsys, here):
    assert cli.main(["show", "learned_mask"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "The masks are trained, by a fit whose own learning rate" in text  # the docstring of the class
    assert "published sparsegpt(pattern='2:4'), learned_mask(weights='reference'), fit(steps=2000" in text
    assert "caveats masks need training: MaskLLM gives them 2,000 steps" in text
    assert cli.main(["show", "wanda"]) == 0
    assert "caveats" not in capsys.readouterr().out


def test_show_a_suite(capsys):
    assert cli.main(["show", "quant"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("quant v1: ") and re.search(r"rtn-2b +quick, full +rtn\(bits=2\)", text)
    assert "{" not in text  # values of sweeps are filled in


@pytest.mark.parametrize("arguments", [["--help"], ["help"], *([name, "--help"] for name in cli.command_names())])
def test_help(arguments, capsys):
    assert cli.main(arguments) == 0
    assert "usage: effbench" in capsys.readouterr().out


def test_help_names_every_option(capsys):
    cli.main(["run", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {field.name}=" in text for field in dataclasses.fields(RunOptions))


def test_no_command(capsys):
    assert cli.main([]) == 2
    assert "usage: effbench" in capsys.readouterr().out


# ---- run ----


def test_a_run_and_a_second_one(here, fakes, capsys):
    assert run("suite=quant", "recipes=rtn*") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tier quick" in lines[0] and "5 cells, 0 done, 5 to run" in lines[0]
    assert lines[1] == lines[-1] == f"records: {here / 'runs'}"
    assert "libraries are loaded once" in lines[2]
    assert [line.split("]")[0] for line in lines[3:8]] == [f"[{i}/5" for i in range(1, 6)]
    assert lines[8].endswith("5 ok")
    assert any("rtn-2b" in line for line in lines[9:])  # the table
    records, notes = Store(here / "runs").read("quant", 1)
    assert len(records) == 5 and notes == []

    assert run("suite=quant", "recipes=rtn*") == 0
    assert "5 done, 0 to run" in capsys.readouterr().out
    assert Store(here / "runs").read()[0] == records


def test_again_runs_what_is_done(here, fakes, capsys):
    assert run("suite=quant", "recipes=rtn-4b") == 0
    assert run("suite=quant", "recipes=rtn-4b,rtn-2b", "--again") == 0
    records = Store(here / "runs").read()[0]
    assert sorted((record.cell.recipe, record.attempt) for record in records) == [
        ("baseline", 1), ("baseline", 2), ("rtn-2b", 1), ("rtn-4b", 1), ("rtn-4b", 2),
    ]  # fmt: skip
    assert all(record.attempt == 2 for record in latest(records).values() if record.cell.recipe != "rtn-2b")
    capsys.readouterr()
    assert run("suite=quant", "recipes=rtn-4b,rtn-2b") == 0
    assert "3 done, 0 to run" in capsys.readouterr().out


def test_published_results_are_never_done(here, fakes, capsys):
    """A clean clone: the first command measures, although the checkout holds published records of the same cells."""
    assert PUBLISHED.is_dir()
    assert run("suite=quant", "--dry-run") == 0
    assert "16 cells, 0 done, 16 to run" in capsys.readouterr().out


def test_a_recipe_is_one_more_row_of_a_suite(here, fakes, capsys):
    assert run("suite=quant", "recipes=rtn-4*", "recipe=rtn(bits=4, symmetric=True), nf4()") == 0
    assert "3 cells" in capsys.readouterr().out
    records = Store(here / "runs").read("quant", 1)[0]
    assert sorted(record.cell.recipe for record in records) == [
        "baseline", "rtn(symmetric=True), nf4()", "rtn-4b",
    ]  # fmt: skip
    assert len({json.dumps(record.cell.settings, sort_keys=True) for record in records}) == 1
    assert run("suite=quant", "recipe=rtn(bits=4)", "recipes=rtn-4b") == 0  # that is the row
    assert "2 cells, 2 done" in capsys.readouterr().out


def test_settings_from_the_command_line(here):
    before = identities(recipes="rtn-4b")["rtn-4b"]
    changes = {"window": 64, "tasks": ["tiny_facts"], "speed_points": [[2, 32]], "probes": ["cost"]}
    given = RunOptions(suite="quant", recipes="rtn-4b", device="cpu")
    after = {planned.job.cell.recipe: planned.job.cell for planned in runner.plan(given, changes).cells}["rtn-4b"]
    assert after.settings == before.settings | changes and after.identity != before.identity
    unset = runner.plan(given, {"limit": None}).cells[0].job.cell.settings
    assert "limit" in before.settings and "limit" not in unset


@pytest.mark.parametrize("way", [["seeds=[0,1]", "limit=7"], ["--set", "seeds=[0,1]", "--set", "limit=7"]])
def test_a_setting_is_given_either_way(here, way, capsys):
    assert run("suite=quant", "recipes=gptq-4b", "--dry-run", "--json", *way) == 0
    rows = json.loads(capsys.readouterr().out)
    given = RunOptions(suite="quant", recipes="gptq-4b", device="cpu", seeds=[0, 1], limit=7)
    assert [row["identity"] for row in rows] == [planned.job.cell.identity for planned in runner.plan(given).cells]


def test_json_is_all_there_is(here, fakes, capfd):
    fakes("chatty")
    assert run("recipe=rtn()", "--json") == 0
    out, err = capfd.readouterr()
    fresh = [json.loads(line) for line in out.splitlines()]  # in the order in which they ended
    assert {record["cell"]["steps"] for record in fresh} == {"", "rtn()"} and len(fresh) == 2
    assert "noise" not in err
    assert run("recipe=rtn()", "--json") == 0
    done = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert done == sorted(fresh, key=lambda record: record["cell"]["steps"])


def test_a_recipe_is_filed_under_adhoc_with_its_baseline(here, fakes):
    assert run("recipe=rtn(bits=8), nf4()") == 0
    records = Store(here / "runs").read("adhoc", 1)[0]
    assert sorted(record.cell.recipe for record in records) == ["baseline", "rtn(bits=8), nf4()"]
    assert run("recipe=nf4()") == 0  # the baseline is done
    assert len(Store(here / "runs").read("adhoc", 1)[0]) == 3


def test_exit_codes(here, fakes, faults, capsys):
    fakes("with_fake_model")
    assert run("recipe=diverge()") == 1
    assert "diverge() seed 0: diverged" in capsys.readouterr().out
    assert run("recipe=diverge()") == 1  # final, not run again, and still not fine
    assert "2 done, 0 to run" in capsys.readouterr().out
    assert run("recipe=crash()") == 1
    assert run("recipe=crash()") == 1
    assert [r.attempt for r in Store(here / "runs").read()[0] if r.outcome == "crashed"] == [1, 2]


def test_a_dry_run(here, fakes, capsys):
    assert run("suite=quant", "recipes=rtn-4b,gptq-4b", "seeds=[0,1]", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["run", "baseline", "0", "new"],
        ["run", "rtn-4b", "0", "new"],  # takes no data: once
        ["run", "gptq-4b", "0", "new"],
        ["run", "gptq-4b", "1", "new"],
    ]
    assert not (here / "runs").exists()
    assert run("suite=quant", "recipes=rtn-4b") == 0
    capsys.readouterr()
    assert run("suite=quant", "recipes=rtn-4b,rtn-2b", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(row["action"], row["why"]) for row in plan] == [("skip", "done: ok"), ("skip", "done: ok"), ("run", "new")]
    assert run("suite=quant", "recipes=rtn-4b", "limit=7", "--dry-run") == 0
    assert capsys.readouterr().out.count("changed: limit") == 2


def test_stray_files_are_noted(here, fakes, capsys):
    folder = here / "runs" / "records" / "adhoc" / "v1"
    folder.mkdir(parents=True)
    (folder / "half.json").write_text('{"schema": 1, ')
    assert run("recipe=rtn()") == 0
    assert "half.json: skipped, not JSON" in capsys.readouterr().err


# ---- identity ----


def identities(**options):
    given = RunOptions(**{"suite": "quant", "recipes": "gptq-4b", "device": "cpu"} | options)
    return {cell.job.cell.recipe: cell.job.cell for cell in runner.plan(given).cells}


def test_the_same_inputs_have_the_same_identity(here):
    assert identities() == identities()
    first, second = identities(), identities(jobs=7, timeout=3.0, results="elsewhere")
    assert {c.identity for c in first.values()} == {c.identity for c in second.values()}


def source(monkeypatch, name, value):
    found = getattr(sources, name)("tiny")
    monkeypatch.setattr(sources, name, lambda *_: dataclasses.replace(found, digest=value))


def suite_file(folder, **changes):
    body = {
        "name": "mine",
        "version": 1,
        "description": "",
        "recipes": [{"name": "gptq-4b", "steps": "gptq(bits=4)"}],
        "tiers": {"quick": {}, "full": {}},
    } | changes
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(body))
    return str(path)


def change_source(patch, module):
    """Have the source of a module be another one."""
    digest = runner.digest_source
    patch.setattr(runner, "digest_source", lambda *roots: "other" if module in roots else digest(*roots))


MUTATIONS = {
    "seed": lambda at, patch: {"seeds": [1]},
    "limit": lambda at, patch: {"limit": 3},
    "dtype": lambda at, patch: {"dtype": "bfloat16"},
    "threads": lambda at, patch: {"threads": 2},
    "tier": lambda at, patch: {"tier": "full"},
    "suite version": lambda at, patch: {"suite": suite_file(at, version=2)},
    "steps": lambda at, patch: {"suite": suite_file(at, recipes=[{"name": "gptq-4b", "steps": "gptq(bits=3)"}])},
    "probes": lambda at, patch: {"suite": suite_file(at, settings={"probes": ["memory"]})},
    "score_block": lambda at, patch: {"suite": suite_file(at, settings={"score_block": 1})},
    "window": lambda at, patch: {"suite": suite_file(at, settings={"window": 64})},
    "calibration": lambda at, patch: {"suite": suite_file(at, settings={"calibration_sequences": 8})},
    "tasks": lambda at, patch: {"suite": suite_file(at, settings={"tasks": ["tiny_copy"]})},
    "model's content": lambda at, patch: source(patch, "model", "other"),
    "data's content": lambda at, patch: source(patch, "data", "other"),
    "another model": lambda at, patch: {"model": "shape:gpt2"},
    "another data set": lambda at, patch: {"data": "hub:wikitext"},
    "other probes": lambda at, patch: {"probes": "memory, cost"},
    "another tokenizer": lambda at, patch: {"tokenizer": "org/name"},
    "tasks' content": lambda at, patch: patch.setattr(sources, "task_digest", lambda: "other"),
    "a probe's source": lambda at, patch: change_source(patch, "effbench.probes.memory"),
    "the method's source": lambda at, patch: change_source(patch, "effbench.methods.quant.gptq"),
    "what opens a model": lambda at, patch: change_source(patch, "effbench.nn.files.load"),
    "a parameter's default": lambda at, patch: patch.setattr(
        "effbench.core.recipe.Recipe.resolved", lambda self: [{"method": "gptq", "new": 1}]
    ),
    "another machine": lambda at, patch: patch.setattr(
        "effbench.machine.environment.describe", lambda device: {"machine": "other"}
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_any_change_of_an_input_changes_the_identity(name, here, monkeypatch):
    base = {"suite": suite_file(here)}
    before = identities(**base)["gptq-4b"]
    changed = MUTATIONS[name](here, monkeypatch) or {}
    after = identities(**base | changed)["gptq-4b"]
    assert after.identity != before.identity


def test_a_suite_names_its_models_and_model_another(here):
    path = suite_file(here, tiers={"quick": {"models": ["shape:gpt2", "tiny"]}, "full": {}})

    def models(**options):
        cells = runner.plan(RunOptions(suite=path, device="cpu", **options)).cells
        return [planned.job.cell.model for planned in cells]

    assert models() == ["shape:gpt2"] * 2 + ["tiny"] * 2
    assert models(model="shape:opt-125m") == ["shape:opt-125m"] * 2
    assert models(tier="full") == ["tiny"] * 2


def test_a_tier_names_its_data_and_data_other(here):
    path = suite_file(here, tiers={"quick": {}, "real": {"models": ["smollm2"], "data": "speeches"}})

    def sources(**options):
        cells = runner.plan(RunOptions(suite=path, device="cpu", **options)).cells
        return {(planned.job.cell.model, planned.job.cell.data, planned.job.data.kind) for planned in cells}

    assert sources() == {("tiny", "tiny", "tiny")}
    assert sources(tier="real") == {("smollm2", "speeches", "speeches")}
    assert sources(tier="real", model="tiny", data="tiny") == {("tiny", "tiny", "tiny")}
    other = sources(tier="real", calibration_data="tiny")
    assert other == {("smollm2", "speeches calibrated on tiny", "speeches")}


def test_a_recipe_without_a_suite_has_a_real_tier(here):
    (cell, *_) = runner.plan(RunOptions(recipe="rtn()", tier="real", device="cpu")).cells
    assert (cell.job.cell.model, cell.job.cell.data, cell.job.cell.tier) == ("smollm2", "speeches", "real")


def test_a_renamed_row_is_the_same_cell(here):
    one = identities(suite=suite_file(here), recipes=None)["gptq-4b"]
    renamed = [{"name": "mine", "steps": "gptq()"}]
    other = identities(suite=suite_file(here, recipes=renamed), recipes=None)["mine"]
    assert one.identity == other.identity


def test_a_method_s_own_source_matters_to_its_rows_alone(here, monkeypatch):
    before = identities(recipes="gptq-4b,rtn-4b")
    change_source(monkeypatch, "effbench.methods.quant.gptq")
    after = identities(recipes="gptq-4b,rtn-4b")
    changed = {name for name in before if before[name].identity != after[name].identity}
    assert changed == {"gptq-4b"}


def test_files_that_a_method_reads_matter(here, faults):
    (here / "notes").write_text("one")
    options = {"suite": None, "recipes": None, "recipe": f"reads_file(path={str(here / 'notes')!r})"}
    one = {cell.identity for cell in identities(**options).values()}
    (here / "notes").write_text("another")
    two = {cell.identity for cell in identities(**options).values()}
    assert len(one & two) == 1  # the baseline
    assert cli.main(["run", f"recipe=reads_file(path={str(here / 'gone')!r})", "device=cpu"]) == 2


def test_model_folders(here):
    folder = here / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1234")
    first = sources.model("model")
    assert (first.kind, first.path) == ("folder", folder) and first.name == f"model@{first.digest[:8]}"
    (folder / "README.md").write_text("does not matter")
    assert sources.model(str(folder)).digest == first.digest
    (folder / "model.safetensors").write_bytes(b"1235")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert sources.model("model").digest != first.digest and sources.model("model").name != first.name
    assert sources.model("org/name") == sources.Source("org/name", "hub")


def test_text_folders(here):
    (here / "text" / "deep").mkdir(parents=True)
    (here / "text" / "deep" / "a.txt").write_text("words")
    first = sources.data("text:text")
    assert (first.kind, first.path) == ("text", here / "text") and first.name == f"text:text@{first.digest[:8]}"
    (here / "text" / "b.txt").write_text("more words")
    assert sources.data("text:text").digest != first.digest
    assert sources.data(None) == sources.data("tiny")
    assert sources.data("hub:org/name").kind == "hub"


def test_a_renamed_row_takes_its_record_along(here, fakes, capsys):
    assert run(f"suite={suite_file(here)}") == 0
    renamed = suite_file(here, recipes=[{"name": "mine", "steps": "gptq()"}])
    capsys.readouterr()
    assert run(f"suite={renamed}") == 0
    out = capsys.readouterr().out
    assert "2 done, 0 to run" in out and "mine" in out


def test_the_module_runs():
    done = python("-m", "effbench", "--version")
    assert done.returncode == 0 and done.stdout.strip()


def test_output_cut_short(here):
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -m effbench list methods | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout


# ---- export ----


def test_an_exported_model_is_measured_like_any_other(here, capsys):
    assert cli.main(["export", "recipe=magnitude(pattern='2:4')", "to=packed", "device=cpu"]) == 0
    assert "MB of tensors, format effbench" in capsys.readouterr().out
    assert cli.main(["export", "recipe=magnitude(pattern='2:4')", "to=dense", "format=dense", "device=cpu"]) == 0
    assert (here / "dense" / "masks.safetensors").is_file()
    sizes = [(here / name / "model.safetensors").stat().st_size for name in ("packed", "dense")]
    assert sizes[0] < 0.75 * sizes[1]
    ids = torch.arange(12)[None]
    models = [open_model(sources.model(name), None, torch.device("cpu"), torch.float32) for name in ("packed", "dense")]
    with torch.no_grad():
        packed, dense = (model(ids).logits for model in models)
    torch.testing.assert_close(packed, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "to= is missing"),
        (["to=new"], "give suite=NAME row=NAME, or recipe="),
        (["to=new", "row=rtn-4b", "recipe=rtn()"], "give suite=NAME row=NAME, or recipe="),
        (["to=new", "row=rtn-4b"], "name the suite that has it"),
        (["to=new", "suite=quant", "row=rtn-4"], "no row of quant in this tier; did you mean 'rtn-4b'"),
        (["to=new", "suite=quint", "row=rtn-4b"], "unknown suite 'quint'"),
        (["to=new", "recipe=fp8_weight()", "format=dense"], "fp8_weight() rounds activations too, which is lost there"),
        (["to=new", "recipe=rtn(), fp8_weight()", "format=dense"], "fp8_weight() rounds activations too"),
        (["to=new", "recipe=rtn()", "--set", "calibration_sequence=4"], "unknown setting 'calibration_sequence'"),
        (["recipe=rtn()"], "to= is missing"),
        (["recipe=rtn()", "to=full"], "to=full: is there already and not empty"),
        (["recipe=rtn()", "to=" + "a" * 5000], "File name too long"),
        (["recipe=rtn()", "to=a\0b"], "must be text"),
        (["recipe=rtn()", "to=/proc/new"], "to=/proc/new: cannot write there"),
        (["recipe=rtn()", "to=full/file/new"], "cannot write there"),
        (["recipe=rtn()", "to=new", "format=gguf"], "unknown format 'gguf'"),
        (["recipe=rtm()", "to=new"], "did you mean 'rtn'?"),
        (["recipe=rtn()", "to=new", "device=tpu"], "must be cpu, cuda or cuda:N"),
    ],
)
def test_wrong_exports(arguments, words, here, capsys):
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    assert cli.main(["export", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (here / "new").exists()


def test_what_cannot_be_exported_is_an_outcome(here, capsys):
    assert cli.main(["export", "recipe=magnitude(pattern='3:6')", "to=new", "device=cpu"]) == 1
    assert "effbench: unsupported:" in capsys.readouterr().err
    assert not (here / "new").exists()


def test_a_run_does_not_report_what_is_gone_from_its_folder(here, fakes, capsys, monkeypatch):
    fakes("quick")
    assert run("suite=quant", "recipes=rtn-4b") == 0
    capsys.readouterr()
    run_cells = batches.run_cells

    def remove(todo, store, *more):
        shutil.rmtree(store.results)
        return run_cells(todo, store, *more)

    monkeypatch.setattr(batches, "run_cells", remove)
    assert run("suite=quant", "recipes=rtn-*b") == 1
    out, err = capsys.readouterr()
    assert "2 records of cells that were done are gone" in err and "rtn-8b" in out and "rtn-4b" not in out
    shutil.move(here / "runs", here / "other")
    assert run("suite=quant", "recipes=rtn-4b", "results=other") == 0


def test_a_list_names_its_columns_and_json_says_null_where_nothing_is_known(here, fakes, capsys):
    fakes("quick")
    assert run("recipe=rtn()") == 0
    capsys.readouterr()
    assert cli.main(["list", "records"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["suite", "version", "tier", "recipe"] and len(lines) == 2
    assert cli.main(["list", "records", "--json"]) == 0
    assert [row["token_ppl"] for row in json.loads(capsys.readouterr().out)] == [None, None]


@pytest.mark.parametrize("what", ["methods", "suites", "models", "ops", "tasks"])
def test_every_list_names_its_columns(what, capsys):
    assert cli.main(["list", what]) == 0
    assert capsys.readouterr().out.split()[0] in ("key", "name")
