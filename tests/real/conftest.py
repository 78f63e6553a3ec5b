"""The real model, opened once: SmolLM2-135M-Instruct as `effbench fetch smollm2` brings it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effbench import sources
from effbench.core.paths import cache_folder
from effbench.nn.files.load import open_run
from effbench.sources import smollm2


@pytest.fixture(scope="session")
def file() -> Path:
    """The GGUF file; the test is skipped where it is not."""
    folder = cache_folder()
    if not smollm2.is_there(folder):
        pytest.skip("the model is not there: effbench fetch smollm2")
    return folder / smollm2.FILE


@pytest.fixture(scope="session")
def texts() -> Path:
    """A folder of text that no vocabulary was made for: that of this project."""
    return Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="session")
def run(file: Path) -> Any:
    """The baseline, its held-out text the speeches."""
    torch.set_num_threads(1)
    return open_run(sources.model("smollm2"), sources.data("speeches"), "cpu", None, 0)


@pytest.fixture(scope="session")
def plain(file: Path) -> Any:
    """What transformers makes of the file by itself, in float32."""
    from transformers import AutoModelForCausalLM, GgufConfig

    how = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=how, dtype=torch.float32
    )
