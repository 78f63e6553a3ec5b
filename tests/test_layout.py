"""The layout that imports depend on."""

import os
import subprocess
import sys
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
