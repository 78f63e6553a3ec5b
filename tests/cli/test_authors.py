"""What an author of a method meets: `new`, `check`, `show`, `list`, `docs`, and a toy method by every way in."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import effbench
from effbench.checks import all_checks
from effbench.cli import main as cli
from effbench.cli.main import main
from effbench.core import registry
from effbench.core.kinds import KINDS
from effbench.records.store import Store

ROOT = Path(effbench.__file__).parent.parent

TOY = '''"""{name}: halves every weight (Nobody, 2026)."""

from dataclasses import dataclass

from effbench.core.kinds import Weights
from effbench.nn.model.linear import rebuilt


@dataclass(frozen=True)
class {name}(Weights):
    """For tests."""

    paper = "unpublished"
    identity = {{"factor": 1.0}}

    factor: float = 0.5  # of every weight

    def compress(self, layer):
        return rebuilt(layer.module, layer.weight * self.factor)
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run_cells(folder, *arguments, **environment):
    """`effbench run` in a process of its own, with cells that take next to nothing."""
    command = [sys.executable, "-P", "-m", "effbench", "run", "device=cpu", "probes=memory", "results=out", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    return done, {record.cell.recipe: record for record in Store(folder / "out").read()[0]}


# ---- new and check ----


@pytest.mark.parametrize("kind", [*KINDS, "apply"])
def test_a_new_method_passes_the_contract(kind, here, capsys):
    name = f"toy_of_{kind.lower()}"
    assert cli.main(["new", "method", kind, name, "to=sub/folder"]) == 0
    said = capsys.readouterr().out
    assert f"effbench check ./sub/folder/{name}.py" in said
    (entry,) = registry.entries_in(f"sub/folder/{name}.py")
    assert entry.kind == kind and entry.summary.startswith(f"Toy of {kind.lower()}:")
    assert entry.facts["identity"] and all(parameter.comment for parameter in entry.parameters.values())
    assert cli.main(["check", f"sub/folder/{name}.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all checks passed" and all(line.startswith("ok ") for line in lines[:-1])


@pytest.mark.parametrize("kind", [*KINDS, "apply"])
def test_templates_follow_the_style(kind, here):
    cli.main(["new", "method", kind, "my_toy"])
    for action in (["check"], ["format", "--check"]):
        command = [Path(sys.executable).parent / "ruff", *action, "--stdin-filename", "methods/mine/my_toy.py", "-"]
        text = (here / "my_toy.py").read_text()
        done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_new_method_in_a_family_is_known_by_its_name(here, monkeypatch, capsys):
    (here / "methods").mkdir()
    monkeypatch.setenv("EFFBENCH_METHODS", str(here / "methods"))
    assert cli.main(["new", "method", "weights", "toy", "to=methods/mine"]) == 0
    assert "effbench check toy\n" in capsys.readouterr().out
    registry._catalog.cache_clear()
    assert cli.main(["check", "toy", "--json"]) == 0
    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert verdicts and all(verdict["ok"] for verdict in verdicts)


@pytest.mark.parametrize("name", ["random", "a" * 60])
def test_a_family_may_have_a_method_of_any_name(name, here, monkeypatch, capsys):
    (here / "methods").mkdir()
    monkeypatch.setenv("EFFBENCH_METHODS", str(here / "methods"))
    assert cli.main(["new", "method", "weights", name, "to=methods/mine"]) == 0
    registry._catalog.cache_clear()
    assert registry.load(name).__name__ == name.capitalize()


FAULTS = {
    "identity": ("layer.weight * self.factor", "layer.weight * 0.5 * self.factor", "logits or text differ"),
    "facts": ("  # of every weight", "", "without a comment beside or above the field: factor"),
    "deterministic": ("* self.factor", "* self.factor + __import__('torch').rand(1)", "two runs with one seed differ"),
    "sparsity": (
        "    paper =",
        "    sparsifies = True\n    sparsity: float = 0.5  # of the weights\n    paper =",
        "0.000 of the weights are zero",
    ),
    "save and load": ("return rebuilt(", "return None and (", r"Toy\.compress returned None.*module \(.*toy\.py:18\)"),
    "linear protocol": (
        "layer.module, layer.weight *",
        "layer.module, layer.weight[1:] *",
        r"Toy\.compress returned a Linear of shape \[127, 128\]; .* one of shape \[128, 128\] \(.*toy\.py:18\)",
    ),
    "undone on exit": (
        "return rebuilt(",
        "return __import__('torch').nn.ReLU() or (",
        r"Toy\.compress returned a ReLU; it must return a linear module \(.*toy\.py:18\)",
    ),
    "touches only its part": (
        "compress(self, layer):\n        return rebuilt(",
        "compress_block(self, layer, shared):\n        return None and (",
        r"Toy\.compress_block returned None; it must return a dict of modules by path \(.*toy\.py:18\)",
    ),
    "architectures": ("layer.weight *", "layer.wait *", r"AttributeError: 'Layer'.* 'wait' \(.*/toy\.py:19\)"),
    "odd shapes": (
        "return rebuilt(",
        "if layer.weight.shape[1] % 8: raise __import__('effbench').core.errors.Unsupported('width 100')\n"
        "        return rebuilt(",
        r"refused while it runs, which check_shape\(out, width\) can say beforehand: width 100",
    ),
}


@pytest.mark.parametrize("check", FAULTS)
def test_a_fault_fails_its_check(check, here, capsys):
    before, after, reason = FAULTS[check]
    write(here / "toy.py", TOY.format(name="Toy").replace(before, after))
    assert cli.main(["check", "toy.py"]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"^FAILED  {check}: .*{reason}", out, re.MULTILINE), out


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ('"""Toy: halves every weight (Nobody, 2026)."""', "", "does not begin with a docstring"),
        ('    paper = "unpublished"\n', "", "paper is not named"),
        ('    """For tests."""\n', "", "class has no docstring"),
    ],
)
def test_what_a_reader_needs_is_checked(before, after, reason, here, capsys):
    write(here / "toy.py", TOY.format(name="Toy").replace(before, after))
    assert cli.main(["list", "methods", "toy.py"]) == 0  # it is listed all the same
    assert cli.main(["check", "toy.py"]) == 1
    assert re.search(rf"^FAILED  facts: .*{reason}", capsys.readouterr().out, re.MULTILINE)


def test_declared_exceptions_must_fail(here, capsys):
    text = TOY.format(name="Toy").replace("    paper =", '    exceptions = {"check_facts": "no time"}\n    paper =')
    write(here / "toy.py", text)
    assert cli.main(["check", "toy.py"]) == 1
    assert "FAILED  facts: passes: take it out of `exceptions`" in capsys.readouterr().out
    write(here / "toy2.py", text.replace("  # of every weight", "").replace("Toy", "Toy2"))
    assert cli.main(["check", "toy2.py"]) == 0
    assert "ok      facts: fails as declared: no time" in capsys.readouterr().out


def test_further_trials_are_checked(here, capsys):
    text = TOY.format(name="Toy").replace("    paper =", '    trials = ({}, {"factor": 0.25})\n    paper =')
    write(here / "toy.py", text)
    assert cli.main(["check", "toy.py"]) == 0
    assert "ok      save and load with factor=0.25" in capsys.readouterr().out


def test_what_an_author_s_code_prints_leaves_results_alone(here, monkeypatch, capsys):
    """At import, when it is made and when it is applied: stdout is for results."""
    shouting = "print('import')\n" + TOY.format(name="Toy").replace(
        "return rebuilt", "print('apply')\n        return rebuilt"
    )
    shouting += "\n    def check(self):\n        print('made')\n"
    write(here / "methods" / "mine" / "toy.py", shouting)
    monkeypatch.setenv("EFFBENCH_METHODS", str(here / "methods"))
    assert cli.main(["check", "toy", "--json"]) == 1  # no docstring any more
    out, err = capsys.readouterr()
    assert len([json.loads(line) for line in out.splitlines()]) == len(all_checks())
    assert {"import", "made", "apply"} <= set(err.splitlines())


def test_a_check_survives_code_that_ends_the_program(here, capsys):
    write(here / "toy.py", TOY.format(name="Toy").replace("return rebuilt", "raise SystemExit(0) or rebuilt"))
    assert cli.main(["check", "toy.py"]) == 1
    assert re.search(r"^FAILED  deterministic: SystemExit: 0 \(.*toy\.py:19\)", capsys.readouterr().out, re.MULTILINE)


def test_an_interrupt_stays_an_interrupt(here, capsys):
    write(here / "toy.py", TOY.format(name="Toy") + "\nraise KeyboardInterrupt\n")
    assert cli.main(["check", "toy.py"]) == 130
    assert capsys.readouterr().err == "effbench: interrupted\n"


# ---- show, list and docs ----


def test_show_explains_parameters_and_heads_what_was_measured(capsys):
    assert cli.main(["show", "wanda", f"results={ROOT / 'results'}"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"sparsity +0\.5 +float +fraction of the weights set to zero\n", text)
    assert "Literal['local', 'row', 'global']" in text
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:3] == ["suite", "tier", "recipe"])
    rows = [tuple(line.split()[:4]) for line in lines[head + 1 :]]
    assert 0 < len(rows) <= 12 and len(set(rows)) == len(rows), "rows are printed twice"
    assert "kl_nats_per_token" in lines[head]


def test_tests_are_those_that_use_the_method(capsys, here):
    assert cli.main(["show", "lottery_ticket", "--json"]) == 0
    tests = json.loads(capsys.readouterr().out)["tests"]
    assert tests and all("lottery_ticket" in (ROOT / path).read_text() for path in tests)
    write(here / "plain.py", TOY.format(name="Plain"))  # there are calls of functions called `plain` in tests
    assert cli.main(["show", "plain.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tests"] == []


@pytest.mark.parametrize("key", sorted(registry.catalog()))
def test_show_knows_the_fields_that_a_recipe_takes(key):
    fields = [field.name for field in dataclasses.fields(registry.load(key))]
    assert sorted(registry.entry(key).parameters) == sorted(fields)


@pytest.mark.parametrize("bases", ["Rates, Weights", "Weights, Rates"])
def test_fields_of_settings_beside_the_base_are_shown(here, capsys, bases):
    rates = "@dataclass(frozen=True)\nclass Rates:\n    lr: float = 0.1  # peak\n"
    both = f"@dataclass(frozen=True)\nclass Both({bases}):\n    bits: int = 4  # of a code\n"
    imports = "from dataclasses import dataclass\n\nfrom effbench.core.kinds import Weights\n"
    write(here / "both.py", f"{imports}\n\n{rates}\n\n{both}")
    assert cli.main(["show", "both.py", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "Weights" and list(facts["parameters"]) == ["lr", "bits"]


@pytest.mark.parametrize(
    ("name", "line"), [("gptq", "published +gptq"), ("rtn", "published +not as a recipe, see caveats\ncaveats +\\w")]
)
def test_show_says_what_is_published(name, line, capsys):
    assert cli.main(["show", name]) == 0
    assert re.search(line, capsys.readouterr().out)


def test_own_files_are_listed_and_shown(here, capsys):
    write(here / "toy.py", TOY.format(name="Toy") + TOY.format(name="Other").partition('"""\n')[2])
    suite = {"name": "mine", "version": 3, "description": "My rows.", "tiers": {"quick": {"seeds": [0]}}}
    suite["recipes"] = [{"name": "r{bits}", "steps": "rtn(bits={bits})", "sweep": {"bits": [2, 3]}}]
    write(here / "mine.yaml", yaml.safe_dump(suite))
    assert cli.main(["list", "methods", "toy.py"]) == 0
    assert re.findall(r"toy\.py:(\w+)", capsys.readouterr().out) == ["Toy", "Other"]
    assert cli.main(["list", "suites", "mine.yaml"]) == 0
    assert capsys.readouterr().out.split()[3:] == ["mine", "3", "My", "rows."]
    assert cli.main(["show", "toy.py:Other"]) == 0
    assert re.search(r"factor +0\.5 +float +of every weight", capsys.readouterr().out)
    assert cli.main(["show", "mine.yaml"]) == 0
    assert re.search(r"r3 +quick +rtn\(bits=3\)", capsys.readouterr().out)
    assert cli.main(["show", "mine.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipes"][1]["steps"] == "rtn(bits=2)"


def test_presets_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(registry, "presets", dict)
    assert cli.main(["list", "presets"]) == 0
    assert capsys.readouterr().err == "effbench: there are no presets\n"
    monkeypatch.setattr(registry, "presets", lambda: {"small": "bf16(), kd(alpha=0.9)"})
    assert cli.main(["list", "presets"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "steps", "takes"]
    assert row.startswith("small  bf16(), kd(alpha=0.9)  temperature, alpha, teacher,")


def test_a_preset_is_shown_with_what_it_takes(capsys, monkeypatch):
    monkeypatch.setattr(registry, "presets", lambda: {"small": "rtn(bits=2), kd(alpha=0.9)", "bare": "bf16()"})
    assert cli.main(["show", "small"]) == 0
    first, _, head, *rows = capsys.readouterr().out.splitlines()
    assert first == "small: rtn(bits=2), kd(alpha=0.9)" and head == "parameters, each of the step that has it"
    assert any(re.match(r"  bits +2 +int +rtn: ", row) for row in rows)
    assert any(re.match(r"  alpha +0.9 +float +kd: ", row) for row in rows)
    assert cli.main(["show", "small", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["preset"] == "small" and shown["steps"] == "rtn(bits=2), kd(alpha=0.9)"
    alpha = shown["parameters"]["alpha"]
    assert (alpha["step"], alpha["type"], alpha["default"]) == ("kd", "float", "0.9") and alpha["comment"]
    assert cli.main(["show", "bare"]) == 0
    assert capsys.readouterr().out == "bare: bf16()\n\nno parameters\n"


def test_the_index_is_written_where_it_is_wanted(here, capsys):
    assert cli.main(["docs", "to=site/pages"]) == 0
    text = (here / "site" / "pages" / "methods.md").read_text()
    for key, entry in registry.catalog().items():
        row = next(line for line in text.splitlines() if line.startswith(f"| [{key}]("))
        assert entry.summary.replace("|", r"\|") in row
        link = re.match(r"\| \[\w+\]\((.*?)\)", row)[1]
        assert (here / "site" / "pages" / link).resolve() == entry.path.resolve()
        assert all(parameter.comment.replace("|", r"\|") in row for parameter in entry.parameters.values())
    assert re.search(r"^\| wanda \|.* scope local, row \|", text, re.MULTILINE)
    assert re.search(r"^\| sparsegpt \|.* -", text, re.MULTILINE)
    assert cli.main(["docs", "to=site/pages"]) == 0  # again is no trouble


def test_docs_leave_out_what_is_broken_and_say_so(here, monkeypatch, capsys):
    texts = {
        "fine": "",
        "torn": "def (",
        "raises": "1 / 0",
        "unmade": "    def check(self):\n        raise OSError('no')\n",
    }
    texts["needs"] = "    scheme: str = field()  # no default\n    trials = ({'scheme': 'a'},)\n"
    texts["shares"] = "    scheme: str = 'b'  # shared with another\n    def check(self): 1 / (self.scheme == 'b')\n"
    for name, more in texts.items():
        text = TOY.format(name=name.capitalize()).replace("import dataclass", "import dataclass, field")
        if name == "needs":
            text = text.replace("@dataclass(", "@dataclass(kw_only=True, ")
        write(here / "own" / "mine" / f"{name}.py", f"{text}\n{more}")
    monkeypatch.setenv("EFFBENCH_METHODS", str(here / "own"))
    assert cli.main(["docs", "to=pages"]) == 1
    page, err = (here / "pages" / "methods.md").read_text(), capsys.readouterr().err
    assert [name for name in texts if f"[{name}](" in page] == ["fine", "needs", "shares"]
    assert re.search(r"^\| shares +\| - +\| yes \|", page, re.MULTILINE) and "[gptq](" in page
    for name in ("raises", "torn", "unmade"):
        assert re.search(rf"^effbench: left out: method '{name}': .*{name}\.py", err, re.MULTILINE)
    assert err.count("\n") == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["new"], "required: what, kind, name"),
        (["new", "suite", "Weights", "toy"], "cannot write a new 'suite'"),
        (["new", "method", "Wieghts", "toy"], "unknown kind 'Wieghts'; did you mean 'Weights'?"),
        (["new", "method", "Weights", "My-Toy"], "'My-Toy' cannot name a method"),
        (["new", "method", "Weights", "../toy"], "'../toy' cannot name a method"),
        (["new", "method", "Weights", "class"], "'class' cannot name a method"),
        (["new", "method", "Weights", "a" * 61], "' cannot name a method: write small letters, digits and _, a letter"),
        (["new", "method", "Weights", "_toy"], "'_toy' cannot name a method"),
        (["new", "method", "Weights", "rtn"], "'rtn' is taken"),
        (["new", "method", "Weights", "there"], "there.py is there already"),
        (["new", "method", "Weights", "toy", "to=there.py"], "to=there.py: is a file"),
        (["new", "method", "Weights", "toy", "to=/proc/toy"], "to=/proc/toy: cannot write there"),
        (["new", "method", "Weights", "toy", "too=x"], "unknown option 'too'; did you mean 'to'?"),
        (["new", "method", "Weights", "toy", "extra"], "unexpected 'extra'"),
        (["check"], "required: name"),
        (["check", "gptqq"], "unknown method 'gptqq'; did you mean 'gptq'?"),
        (["check", "nowhere.py"], "nowhere.py: no such file"),
        (["check", "there.py"], "there.py: defines no method"),
        (["check", "two.py"], "two.py: name the class, two.py:One or two.py:Two"),
        (["check", "two.py:Three"], "two.py: defines no method 'Three'"),
        (["check", "two.py:One"], "does not define compress(layer)"),
        (["check", "rtn", "gptq"], "unrecognized arguments: gptq"),
        (["show", "there.py"], "there.py: defines no method"),
        (["show", "nowhere.yaml"], "suite=nowhere.yaml: no such file"),
        (["list", "methods", "nowhere.py"], "nowhere.py: no such file"),
        (["list", "tasks", "there.py"], "tasks are not listed from a file, methods and suites are"),
        (["list", "suites", "there.py"], "unknown suite 'there.py'"),
        (["list", "preset"], "did you mean 'presets'?"),
        (["docs"], "to= is missing"),
        (["docs", "to=there.py"], "to=there.py: cannot write there"),
        (["docs", "--check"], "unrecognized arguments: --check"),
    ],
)
def test_wrong_usage(arguments, words, here, capsys):
    write(here / "there.py", "x = 1\n")
    one = "from effbench.core.kinds import Weights\nfrom dataclasses import dataclass\n"
    one += "@dataclass(frozen=True)\nclass One(Weights): pass\nclass Two(One): pass\n"
    write(here / "two.py", one)
    before = sorted(here.rglob("*"))
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("effbench: ") and err.count("\n") == 1 and words in err
    assert [path for path in sorted(here.rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize("command", [["list"], ["show", "rtn"], ["check", "rtn"], ["run", "suite=quant"], ["doctor"]])
def test_a_wrong_folder_of_methods_is_named_by_every_command(command, here, monkeypatch, capsys):
    monkeypatch.setenv("EFFBENCH_METHODS", str(here / "nowhere"))
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and "EFFBENCH_METHODS: " in err and err.count("\n") == 1


# ---- one file, every way in ----


def test_a_method_outside_is_one_file(here, capsys, monkeypatch):
    """Listed, shown, parsed, checked and measured by a suite, in workers too, beside what it may not shadow."""
    folder = here / "my methods"
    names = ["halves", "random", "psutil", "json", "torch"]
    for name in names:
        write(folder / "mine" / f"{name}.py", TOY.format(name=name.capitalize()))
    write(here / "loose" / "loose.py", TOY.format(name="Loose"))
    rows = [{"name": name, "steps": f"{name}(factor=0.25)"} for name in names]
    rows += [{"name": "loose", "steps": "'loose/loose.py:Loose'(factor=0.75), halves()"}]
    tiers = {"quick": {"settings": {"calibration_sequences": 2}}}
    suite = {"name": "mine", "version": 1, "description": "", "recipes": rows, "tiers": tiers}
    write(here / "mine.yaml", yaml.safe_dump(suite))

    monkeypatch.setenv("EFFBENCH_METHODS", str(folder))
    assert cli.main(["list"]) == 0
    assert re.search(
        r"^halves +mine +Weights +unpublished +Halves: halves every", capsys.readouterr().out, re.MULTILINE
    )
    assert cli.main(["check", "halves"]) == 0
    done, records = run_cells(here, "suite=mine.yaml", EFFBENCH_METHODS=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: record.outcome for name, record in records.items()} == dict.fromkeys(
        ["baseline", "loose", *names], "ok"
    )
    assert records["loose"].cell.resolved[0] == {"method": f"{here}/loose/loose.py:Loose", "factor": 0.75}
    capsys.readouterr()
    for name, recipe in [("halves", "loose"), ("loose/loose.py", "loose"), ("torch", "torch")]:
        assert cli.main(["show", name, "results=out"]) == 0
        assert re.search(rf"mine v1 +quick +{recipe} +tiny +1 +ok", capsys.readouterr().out)
    again, _ = run_cells(here, "suite=mine.yaml", EFFBENCH_METHODS=str(folder))
    assert "7 done, 0 to run" in again.stdout
    path = folder / "mine" / "halves.py"
    path.write_text(path.read_text() + "CHANGED = 1\n")
    planned, _ = run_cells(here, "suite=mine.yaml", "--dry-run", EFFBENCH_METHODS=str(folder))
    assert re.findall(r"^run +(\S+)", planned.stdout, re.MULTILINE) == ["halves", "loose"]


@pytest.mark.slow
def test_a_crash_names_file_line_and_record(here):
    write(here / "toy.py", TOY.format(name="Toy").replace("layer.weight *", "layer.wait *"))
    done, records = run_cells(here, "recipe=./toy.py:Toy()")
    assert done.returncode == 1
    record = records["./toy.py:Toy()"]
    place = rf"\({here.name}/toy\.py:19\)"
    assert re.search(rf"AttributeError: 'Layer' object has no attribute 'wait' {place}$", record.reason)
    assert re.search(rf"^\[\d/2\] \./toy\.py:Toy\(\) seed 0: crashed in .* {place}$", done.stdout, re.MULTILINE)
    (path,) = re.findall(r"^traceback of \./toy\.py:Toy\(\), seed 0: (.*)$", done.stdout, re.MULTILINE)
    assert "in compress" in json.loads((here / path).read_text())["traceback"]


@pytest.fixture
def tree(here):
    """A copy of the source tree with one file more."""
    tree = here / "tree"
    left_out = shutil.ignore_patterns("__pycache__", ".*", "results", "tests", "docs")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left_out)
    before = {path for path in tree.rglob("*") if path.is_file()}
    write(tree / "methods" / "quant" / "halves.py", TOY.format(name="Halves"))
    assert {path for path in tree.rglob("*") if path.is_file()} - before == {tree / "methods" / "quant" / "halves.py"}
    return tree


def test_a_method_inside_is_one_file(here, tree):
    def ask(*arguments):
        command = [sys.executable, "-P", "-m", "effbench", *arguments]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert re.search(r"^halves +quant +Weights", ask("list"), re.MULTILINE)
    assert re.search(r"factor +0\.5 +float +of every weight", ask("show", "halves"))
    ask("docs", "to=pages")
    assert "[halves](" in (here / "pages" / "methods.md").read_text()


@pytest.mark.slow
def test_a_method_inside_is_measured(here, tree):
    done, records = run_cells(here, "recipe=halves(factor=0.25)", PYTHONPATH=str(tree))
    assert done.returncode == 0 and records["halves(factor=0.25)"].outcome == "ok"


BAD = {  # what an author's file may do wrong, each with what the one line says
    "a field without default": ("    f: float\n", "missing 1 required positional argument"),
    "its own check raises": ("    def check(self):\n        raise ValueError('no such grid')\n", "no such grid"),
    "an annotation of nothing": ("    f: 'Floot' = 1.0\n", "Floot"),
    "a parameter that no record can hold": ("    f: Path = Path('x')\n", "f: Path is no type of a parameter"),
    "many of them": ("    f: dict[str, list[object]] = field(default_factory=dict)\n", "is no type of a parameter"),
    "slots that fail": ("    def slots(self):\n        return 1 / 0\n", "ZeroDivisionError"),
    "files that are no paths": ("    def files(self):\n        return ('a.txt',)\n", "must be paths"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_an_author_s_own_code_raises_is_one_line(name, here, capsys):
    body, words = BAD[name]
    (here / "bad.py").write_text(
        '"""Bad."""\nfrom dataclasses import dataclass, field\nfrom pathlib import Path\n'
        "from effbench.core.kinds import Weights\n\n\n"
        f"@dataclass(frozen=True)\nclass Bad(Weights):\n{body}\n"
        "    def compress(self, layer):\n        return layer.module\n"
    )
    assert main(["run", "recipe=./bad.py:Bad()", "device=cpu", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert words in err and "bad.py" in err and err.count("\n") == 1


WORKS = """\"\"\"Works.\"\"\"
from dataclasses import dataclass, field
from effbench.core.kinds import Weights

print("imported")


@dataclass(frozen=True)
class Works(Weights):
    sizes: tuple[int, ...] = field(default_factory=lambda: (1, 2))

    def compress(self, layer):
        return layer.module
"""


def test_what_a_file_prints_when_imported_is_no_output_and_made_defaults_are_defaults(here, capsys):
    (here / "works.py").write_text(WORKS)
    assert main(["run", "recipe=./works.py:Works()", "device=cpu", "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["recipe"] for row in json.loads(out)] == ["baseline", "./works.py:Works()"] and "imported" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "methods", "works.yaml"], "methods are defined in a FILE.py, suites in a FILE.yaml"),
        (["run", "recipe=./works.py:Works"], "brackets are missing; write ./works.py:Works()"),
        (["run", "recipe=rtn(), ./works.py:Works, fit()"], "write ./works.py:Works()"),
        (["run", "recipe=./loose.py:Works()"], "write @dataclass(frozen=True)"),
        (["show", "rtn", "results=~nobody_of_that_name/x"], "results=~nobody"),
        (["new", "method", "Weights", "x" * 300], "at most 60 in all"),
        (["new", "method", "Weights", "random"], "would be taken for Python's random"),
        (["new", "method", "Weights", "torch"], "would be taken for Python's torch"),
    ],
)
def test_slips_of_an_author_are_one_line(words, message, here, capsys):
    (here / "works.py").write_text(WORKS)
    (here / "works.yaml").write_text("name: works\n")
    (here / "loose.py").write_text(WORKS.replace("(frozen=True)", ""))
    assert main(words) == 2
    err = capsys.readouterr().err.removeprefix("imported\n")
    assert message in err and err.count("\n") == 1
    assert not (here / "random.py").exists()


@pytest.mark.parametrize("command", [["check", "{}"], ["show", "{}"], ["list", "methods", "{}"]])
@pytest.mark.parametrize("file", ["~nobody_of_that_name/a.py", "a" * 5000 + ".py"])
def test_names_that_no_file_can_have_are_one_line(command, file, capsys):
    assert main([word.format(file) for word in command]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_that_new_prints_can_be_typed(here, capsys):
    assert main(["new", "method", "Weights", "mine", f"to={here / 'a folder'}"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "effbench run" in line)
    assert main([*shlex.split(line)[1:], "device=cpu", "--dry-run"]) == 0
