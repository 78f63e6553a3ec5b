"""What documents and docstrings tell people to write works: Python blocks run, commands are understood."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

import effbench
from effbench.cli import main as cli
from effbench.core.errors import Usage
from effbench.core.recipe import parse
from effbench.core.usage import parse as parse_options

PACKAGE = Path(effbench.__file__).parent
ROOT = PACKAGE.parent
PAGES = [
    page for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "methods" / "README.md") if page.is_file()
]
SOURCES = [*PACKAGE.glob("*.py"), *(p for room in PACKAGE.iterdir() if room.is_dir() for p in room.rglob("*.py"))]


def find_blocks(text, language):
    """Code blocks of a page: first line and text of each."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start()].count("\n") + 2, match[1]


def find_commands(text):
    """Every `effbench ...` in the shell blocks of a page, as words."""
    for _, block in find_blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", line.partition(" #")[0]):
                words = shlex.split(part)
                if words and Path(words[0]).name == "effbench":
                    yield words[1:]


def understand(arguments):
    """Raise `Usage` unless the command line takes these arguments; nothing is run."""
    name, *rest = arguments
    if name not in cli.command_names():
        raise Usage(f"unknown command {name!r}")
    command = cli.load_command(name)
    given = command.parser(name).parse_intermixed_args(rest)
    if command.options is not None:
        options = parse_options(command.options, given.options)
        recipe = getattr(options, "recipe", None)
        if recipe is not None and ".py:" not in recipe:
            parse(recipe)


def run_block(text, name, folder):
    """Import a block as a module of its own, as a file would be."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]


def cases(find):
    """Parameters: page and snippet."""
    return [
        pytest.param(snippet, id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, snippet in enumerate(find(page.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("block", cases(lambda text: find_blocks(text, "python")))
def test_python_blocks_run(block, tmp_path):
    run_block(block[1], "snippet", tmp_path)


@pytest.mark.parametrize("arguments", cases(find_commands))
def test_commands_are_understood(arguments):
    understand(arguments)


def test_there_is_something_to_test():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(list(find_commands(readme))) > 5 and list(find_blocks(readme, "python"))


def test_the_method_of_the_readme_is_complete(tmp_path, capsys):
    """The block of "Add a method", as the one file that it is said to be."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [text for _, text in find_blocks(readme, "python") if "class Absmean" in text]
    (tmp_path / "absmean.py").write_text(block)
    assert cli.main(["check", str(tmp_path / "absmean.py")]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", [p for p in SOURCES if ">>> " in p.read_text()], ids=lambda p: p.name)
def test_examples_in_docstrings_run(path):
    module = importlib.import_module(".".join(("effbench", *path.relative_to(PACKAGE).with_suffix("").parts)))
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def loose_code(path):
    """Indented blocks in docstrings that are Python with a call in it, but no example that is run."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            for block in re.findall(r"(?:^    +.*\n?)+", ast.get_docstring(node) or "", re.MULTILINE):
                try:
                    tree = ast.parse(textwrap.dedent(block))
                except SyntaxError:
                    continue
                if any(isinstance(part, ast.Call) for part in ast.walk(tree)):
                    yield block


def test_code_in_docstrings_is_an_example_that_runs():
    assert {path: blocks for path in SOURCES if (blocks := list(loose_code(path)))} == {}


# ---- planted faults ----


@pytest.mark.parametrize(
    "block",
    [
        "from effbench import checks\nfor check in checks.all_checks().values(): pass\n",
        "from effbench.core.kinds import Weights\nclass Absmean(Weights): ...\nAbsmean()\n",
        "import effbench.nowhere\n",
    ],
)
def test_a_block_that_does_not_work_fails(block, tmp_path):
    page = f"text\n```python\n{block}```\n"
    ((line, text),) = find_blocks(page, "python")
    assert line == 3
    with pytest.raises((AttributeError, Usage, ImportError)):
        run_block(text, "snippet", tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "effbench docs --check",
        "effbench run suit=quant",
        "a && .venv/bin/effbench rnu suite=quant",
        "effbench run recipe='gptq(bit=3)'   # text",
        "effbench list methods \\\n  --jsno",
    ],
)
def test_a_command_that_is_not_understood_fails(line):
    (arguments,) = find_commands(f"```sh\n{line}\n```\n")
    with pytest.raises(Usage):
        understand(arguments)


def test_code_that_is_no_example_is_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Text.\n\n    for check in all_checks():\n        check(x)\n\nMore.\n\n    a    a table, of words\n"""\n'
    )
    assert len(list(loose_code(path))) == 1
