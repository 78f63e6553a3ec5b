"""The layout that imports depend on."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import effbench

PACKAGE = Path(effbench.__file__).parent
ROOT = PACKAGE.parent
checkout = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a source checkout")


@checkout
@pytest.mark.parametrize("name", ["methods", "kernels", "suites"])
def test_links_are_relative_and_point_to_the_top(name):
    assert os.readlink(PACKAGE / name) == f"../{name}"


def test_kernels_is_no_regular_package():
    """A package `kernels` exists elsewhere; a regular one at the root of a checkout would shadow it."""
    assert not (PACKAGE / "kernels" / "__init__.py").exists()


def test_one_import_name():
    code = (
        "import sys; from effbench.core import registry\n"
        "for key in registry.catalog(): registry.load(key)\n"
        # transformers looks for a package called kernels and finds the folder; nothing may be loaded from it
        "stray = [m for m in sys.modules if m.startswith(('methods', 'kernels.', 'suites'))]\n"
        "assert not stray, stray"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_core_and_the_command_line_loads_no_torch():
    code = "import sys, effbench.cli.main, effbench.ops, effbench.core.recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@checkout
def test_layers_are_kept():
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]  # of this environment, activated or not
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


FOR_OTHERS = {"accelerate"}  # by transformers, where it opens a model without its weights
IMPORTED_AS = {
    "nvidia-ml-py": "pynvml",
    "PyYAML": "yaml",
    "lm-eval": "lm_eval",
    "scikit-learn": "sklearn",
    "HanTa": "HanTa",
}


def imported_modules():
    """Top names of what the package imports anywhere."""
    names = set()
    folders = (PACKAGE, PACKAGE / "methods", PACKAGE / "kernels")  # a search does not follow links
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names


@checkout
def test_what_is_declared_as_a_dependency_is_imported():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in declared}
    imported = imported_modules()
    unused = {name for name in names if IMPORTED_AS.get(name, name.lower()) not in imported}
    assert unused == FOR_OTHERS
