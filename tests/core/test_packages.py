"""Methods outside the repository: packages of their own, that shadow nothing and mix with nothing."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.core import provenance, registry
from effbench.core.errors import Usage
from effbench.core.packages import module_file
from effbench.core.provenance import digest_source
from effbench.core.recipe import parse, parse_step

HALVES = """
from dataclasses import dataclass
from effbench.core.kinds import Weights
from effbench.nn.model.linear import rebuilt
from ._common import FACTOR

@dataclass(frozen=True)
class {name}(Weights):
    '''For tests.'''
    factor: float = FACTOR  # of every weight
    def compress(self, layer):
        return rebuilt(layer.module, layer.weight * self.factor)
"""


def write_root(root, factor, *names):
    """A folder of methods with a file that they share."""
    family = root / "mine"
    family.mkdir(parents=True)
    (family / "_common.py").write_text(f"FACTOR = {factor}\n")
    for name in names:
        (family / f"{name}.py").write_text(f'"""{name}: a toy."""\n{HALVES.format(name=name.capitalize())}')
    return root


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Folders of methods, all of them in `EFFBENCH_METHODS`."""

    def name(*roots):
        monkeypatch.setenv("EFFBENCH_METHODS", ":".join(map(str, roots)))
        return roots

    return name


def test_files_of_one_name_in_two_folders_do_not_mix(tmp_path, outside):
    outside(write_root(tmp_path / "a", 0.5, "first"), write_root(tmp_path / "b", 0.25, "second"))
    first, second = parse_step("first()"), parse_step("second()")
    assert (first.factor, second.factor) == (0.5, 0.25)
    assert registry.load("first").__module__ != registry.load("second").__module__
    assert parse_step(str(first)) == first


@pytest.mark.parametrize("name", ["random", "psutil", "json", "torch"])
def test_a_method_named_like_a_library_leaves_it_alone(name, tmp_path, outside):
    library = importlib.import_module(name)
    outside(write_root(tmp_path / "root", 0.5, name))
    method = parse_step(f"{name}()")
    assert type(method).__name__ == name.capitalize() and method.key == name
    assert sys.modules[name] is library and importlib.import_module(name) is library


def test_files_of_modules_can_be_followed(tmp_path, outside):
    (root,) = outside(write_root(tmp_path / "root", 0.5, "toy"))
    module = registry.entry("toy").module
    assert module_file(module) == root / "mine" / "toy.py"
    shared = f"{module.rpartition('.')[0]}._common"
    assert module_file(shared) == root / "mine" / "_common.py"
    assert module_file(f"{shared}.nothing") is None and module_file("json") is None
    assert module_file("effbench.core.run").name == "run.py"


def test_digests_of_outside_methods_are_those_of_their_source(tmp_path, outside):
    write_root(tmp_path / "a", 0.5, "toy")
    path = tmp_path / "a" / "mine" / "toy.py"
    module = registry.entry(f"{path}:Toy").module
    digests = {digest_source(module)}
    for changed in (path, path.with_name("_common.py")):
        provenance._digest_source.cache_clear()
        changed.write_text(changed.read_text() + "FURTHER = 1\n")
        digests.add(digest_source(module))
    assert len(digests) == 3


# ---- no file of an author's is missing in a digest ----


@pytest.fixture
def importing(tmp_path, outside, monkeypatch):
    """The module of a method that begins with some code, with files around it that the code may import."""
    (root,) = outside(write_root(tmp_path / "root", 0.5, "toy"))
    for name in ("mine/_beside", "mine/lib/inner", "above", "mine/random", "random"):
        path = root / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("X = 1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(root / "mine")])  # so that plain imports work

    def write(code):
        path = root / "mine" / "toy.py"
        path.write_text(f"{code}\n{path.read_text()}")
        registry._catalog.cache_clear()
        return registry.entry("toy").module

    yield write
    sys.modules.pop("_beside", None)


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("import importlib\nimportlib.import_module('._beside', __package__)", ["_beside"]),
        ("import importlib as i\ni.import_module('.lib.inner', package=__package__)", ["inner"]),
        ("from importlib import import_module as get\nget('..above', __package__)", ["above"]),
        ("from . import _beside\nfrom .lib.inner import X", ["_beside", "inner"]),
        ("import random, importlib\nimportlib.import_module('json.tool')\n__import__('math')", []),
        ("class A:\n    path = 1\n    def exec(self): return self.exec, self.path\nTEXT = 'lib:x'", []),
        ("import re, sys\nre.compile('x'), eval('1'), sys.platform", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import _beside", []),
    ],
)
def test_imports_of_every_kind_are_in_the_digest(code, files, importing):
    module = importing(code)
    followed = provenance.follow_imports([module], (module.partition(".")[0],))
    assert sorted(path.stem for path in followed.values()) == sorted(["_common", "toy", *files])
    registry.load("toy")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import _beside", r"1: _beside would be no part .*; write `from \. import _beside`"),
        ("import json, _beside as b", "1: _beside would"),
        ("\ndef f():\n    from _beside import X", "3: _beside would"),
        ("import lib.inner", r"1: .*; write `from \. import lib`"),
        ("from above import X", r"1: .*; write `from \.\. import above`"),
        ("import importlib\nimportlib.import_module('_beside')", "2: _beside would"),
        ("__import__('_beside')", "1: _beside would"),
        ("import importlib\nfor x in 'ab':\n    importlib.import_module(f'._{x}', __package__)", "3: importlib.imp"),
        ("from importlib import import_module\nget = import_module", "2: import_module may run"),
        ("import importlib\nimportlib.import_module('.x', 'json')", "2: importlib.import_module may run"),
        ("import importlib\nimportlib.import_module()", "2: importlib.import_module may run"),
        ("import sys\nsys.path.insert(0, 'lib')", r"2: sys\.path may run files .* folders of libraries in PYTHONPATH"),
        ("from sys import path\npath.append('lib')", "2: path may run"),
        ("from importlib import util\nutil.spec_from_file_location('a', 'b.py')", "2: util.spec_from_file_location"),
        ("import runpy\nrunpy.run_path('b.py')", "2: runpy.run_path"),
        ("exec(open('b.py').read())", "1: exec may run"),
    ],
)
def test_imports_that_a_digest_would_miss_are_refused(code, words, importing):
    importing(code)
    with pytest.raises(Usage, match=rf"^method 'toy': .*/mine/toy\.py:{words}") as caught:
        registry.load("toy")
    assert "\n" not in str(caught.value)


def test_a_file_that_a_method_imports_is_held_to_the_same(importing, tmp_path):
    importing("")
    (tmp_path / "root" / "mine" / "_common.py").write_text("import _beside\nFACTOR = 1.0\n")
    with pytest.raises(Usage, match=r"/mine/_common\.py:1: _beside would be no part"):
        registry.load("toy")


def test_shipped_methods_hide_no_import():
    for entry in registry.catalog().values():
        provenance.check_imports(entry.module)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "is not there"),
        (lambda root: root.write_text("x"), "is no folder"),
        (lambda root: (root.mkdir(), (root / "toy.py").write_text("x")), "holds toy.py itself"),
    ],
)
def test_a_path_of_the_wrong_shape_is_named(make, words, tmp_path, outside):
    make(tmp_path / "root")
    outside(tmp_path / "root")
    with pytest.raises(Usage, match=rf"^EFFBENCH_METHODS: .*{words}; it names folders that hold FAMILY/NAME\.py"):
        registry.catalog()


def test_a_file_that_cannot_be_a_module_is_broken(tmp_path, outside):
    outside(write_root(tmp_path / "root", 0.5, "toy", "my-toy"))
    (tmp_path / "root" / "mine" / "folder.py").mkdir()
    with pytest.raises(Usage, match=r"folder\.py cannot be read \(Is a directory\)"):
        registry.load("folder")
    with pytest.raises(Usage, match=r"my-toy\.py its name and its folder's may hold letters"):
        registry.load("my-toy")
    assert parse_step("toy()").factor == 0.5


# ---- FILE.py:CLASS ----


@pytest.fixture
def file(tmp_path, monkeypatch):
    """`my folder/mine.py` with the method `Mine`, and the folder above it as working folder."""
    folder = write_root(tmp_path / "x", 0.5, "mine") / "mine"
    folder = folder.rename(tmp_path / "my folder")
    monkeypatch.chdir(tmp_path)
    return folder / "mine.py"


def test_a_file_is_named_in_every_usual_way(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent.parent))
    expected = parse_step(f"'{file}:Mine'(factor=0.75)")
    spellings = ["'./my folder/mine.py:Mine'(factor=0.75)", '"~/my folder/mine.py:Mine" (factor=0.75)']
    (file.parent.parent / "plain").symlink_to(file.parent)
    assert [parse_step(text) for text in spellings] == [expected] * 2
    plain = parse_step("./plain/mine.py:Mine(factor=0.75)")
    assert plain.factor == 0.75 and parse_step(str(plain)) == plain
    monkeypatch.chdir(file.parent)
    assert str(parse_step("mine.py:Mine(factor=0.75)")) == str(expected)


def test_the_canonical_step_holds_the_whole_path(file, monkeypatch):
    method = parse_step("'./my folder/mine.py:Mine'(factor=0.75)")
    assert str(method) == f"'{file}:Mine'(factor=0.75)"
    assert method.label == "./my folder/mine.py:Mine(factor=0.75)"
    monkeypatch.chdir("/usr")
    assert parse_step(str(method)) == method
    assert method.label == "my folder/mine.py:Mine(factor=0.75)"
    assert parse(str(method)).resolved() == [{"method": f"{file}:Mine", "factor": 0.75}]


def test_files_and_names_stand_in_one_recipe(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    recipe = parse("rtn(grid='awq'),./mine.py:Mine(), mine.py:Mine(factor=1), lora(targets=('./x.py:Y(', 'b'))")
    assert [step.key for step in recipe.steps] == ["rtn", f"{file}:Mine", f"{file}:Mine", "lora"]
    assert recipe.steps[3].targets == ("./x.py:Y(", "b")
    assert parse(str(recipe)).steps == recipe.steps


def test_a_registered_method_keeps_its_name(tmp_path, outside):
    (root,) = outside(write_root(tmp_path / "root", 0.5, "toy"))
    assert str(parse_step(f"{root}/mine/toy.py:Toy()")) == "toy()"
    with (root / "mine" / "toy.py").open("a") as file:
        file.write("\n@dataclass(frozen=True)\nclass Other(Toy):\n    '''Another.'''\n")
    other = parse_step(f"{root}/mine/toy.py:Other()")
    assert str(other) == f"'{root}/mine/toy.py:Other'()" and parse_step(str(other)) == other


@given(name=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_any_folder_can_be_written_in_a_step(name):
    """Quotes, brackets, commas, newlines: the canonical step parses back to the same method."""
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / f"x{name}"
        folder.mkdir()
        (folder / "mine.py").write_text(
            HALVES.format(name="Mine").replace("._common import FACTOR", "math import e as FACTOR")
        )
        method = parse_step(f"{str(folder / 'mine.py') + ':Mine'!r}(factor=2)")
        assert parse(f"rtn(), {method}").steps[1] == method and method.key == f"{folder}/mine.py:Mine"


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("./nowhere.py:Mine()", r"\./nowhere\.py: no such file"),
        ("mine.py:Mien()", "mine.py: defines no method 'Mien'; did you mean 'Mine'?"),
        (")(0", r"unmatched '\)'; write steps as name\(key=value\)"),
        ("rtn(), ) + (gptq()", r"unmatched '\)'"),
        ("mine.py()", r"mine\.py: name the class, mine\.py:Mine$"),
        ("./my folder/mine.py:Mine()", "in quotes where the path has spaces"),
        ("mine.py:Mine", r"brackets are missing; write mine\.py:Mine\(\)$"),
        ("rtn(), ./mine.py:Mine , gptq()", r"write \./mine\.py:Mine\(\)$"),
        ("./mine.py", r"write \./mine\.py:CLASS\(\)$"),
        ("mine.py", r"mine\.py is not a step; write mine\.py:CLASS\(\)$"),
        ("'my mine.py:Mine'", r"is not a step; write 'my mine\.py:Mine'\(\)$"),
        ("empty.py:Mine()", "empty.py: defines no method: a class whose base is"),
        ("torn.py:Mine()", r"torn\.py: cannot be read: .*line 1"),
        ("binary.py:Mine()", "binary.py: cannot be read"),
        (
            "beside.py:Beside()",
            r"/beside\.py:1: helpers would be no part .*; write `from \. import helpers`",
        ),
        ("exits.py:Exits()", r"cannot be imported: SystemExit\(3\) \(.*exits\.py:4\)"),
        ("quits.py:Quits()", r"^method .*quits\.py:Quits': SystemExit\('done'\) \(.*quits\.py:6\)"),
        ("thawed.py:Thawed()", r"\(.*/thawed\.py:3\); write @dataclass\(frozen=True\) above the class$"),
        ("follows.py:Follows()", r"follows\.py cannot be imported: .*\(torn\.py, line 1\)"),
        ("follows2.py:Follows()", r"follows2\.py cannot be imported: not UTF-8 at byte 0 \(binary\.py\)"),
        ("deep.py:Deep()", "beyond top-level package"),
        ("my-mine.py:Mine()", "may hold letters, digits and _ only"),
    ],
)
def test_wrong_files_cost_one_line(step, words, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    base = "from effbench.core.kinds import Weights\n"
    texts = {
        "empty": "X = 1\n",
        "torn": "class (\n",
        "beside": f"import helpers\n{base}class Beside(Weights): pass\n",
        "helpers": "",
        "exits": f"{base}class Exits(Weights): pass\nimport sys\nsys.exit(3)\n",
        "quits": f"from dataclasses import dataclass\n{base}@dataclass(frozen=True)\nclass Quits(Weights):\n"
        "    def compress(self, layer): pass\n    def check(self): raise SystemExit('done')\n",
        "thawed": f"from dataclasses import dataclass\n{base}@dataclass\nclass Thawed(Weights): pass\n",
        "follows": f"from . import torn\n{base}class Follows(Weights): pass\n",
        "follows2": f"from . import binary\n{base}class Follows(Weights): pass\n",
        "deep": f"from ... import x\n{base}class Deep(Weights): pass\n",
        "my-mine": f"{base}class Mine(Weights): pass\n",
    }
    for name, text in texts.items():
        (file.parent / f"{name}.py").write_text(text)
    (file.parent / "binary.py").write_bytes(b"\xff\x00")
    with pytest.raises(Usage, match=words) as caught:
        parse(step)
    assert "\n" not in str(caught.value)
