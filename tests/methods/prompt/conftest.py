"""A run on the embedded model, and prompts of every form."""

from __future__ import annotations

import pytest

from effbench import sources
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun


@pytest.fixture(scope="session")
def run() -> ModelRun:
    settings = {"calibration_sequences": 2, "calibration_length": 32}
    return open_run(sources.model("tiny", None), sources.data(None), "cpu", "float32", 0, settings)
