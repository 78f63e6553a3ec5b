"""What tests share: a folder of private methods, importable fakes, and jobs made to measure."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
METHODS = HERE / "methods_for_tests"

# Worker processes inherit both: methods that misbehave on purpose, and `fake_cells`.
os.environ["EFFBENCH_METHODS"] = str(METHODS)
sys.path.insert(0, str(HERE))


@pytest.fixture
def store(tmp_path):
    from effbench.store import Store

    return Store(tmp_path / "results")
