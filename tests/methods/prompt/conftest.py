"""A run on the embedded model, and prompts of every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from effbench import sources, tiny
from effbench.core.views import Segments
from effbench.methods.prompt._common import count_tokens, cut, is_context
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun


@pytest.fixture(scope="session")
def run() -> ModelRun:
    settings = {"calibration_sequences": 2, "calibration_length": 32}
    return open_run(sources.model("tiny", None), sources.data(None), "cpu", "float32", 0, settings)


@pytest.fixture(scope="session")
def of_contexts() -> Callable[[Segments, float], float]:
    """`keep` of a prompt of which a share of the tokens of its contexts stays, and all else."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny.MODEL)

    def find(prompt: Segments, share: float) -> float:
        pieces = cut(prompt, tokenizer)
        total = count_tokens(pieces)
        size = count_tokens(piece for piece in pieces if is_context(piece, prompt))
        return (total - size + share * size) / total

    return find
