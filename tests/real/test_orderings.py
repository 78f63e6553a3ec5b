"""What the tiny model cannot tell: the order of the literature, on a real model and real text."""

from __future__ import annotations

import pytest
import torch

from effbench import sources
from effbench.core.recipe import parse
from effbench.nn.files.load import open_run
from effbench.probes import perplexity

pytestmark = pytest.mark.real
SETTINGS = {"calibration_sequences": 16, "calibration_length": 256, "window": 512, "text_tokens": 8 * 512}


def measure(steps: str) -> float:
    """Perplexity of the speeches after a recipe."""
    torch.set_num_threads(1)
    run = open_run(sources.model("smollm2"), sources.data("speeches"), "cpu", None, 0, SETTINGS)
    recipe = parse(steps)
    for step in recipe.steps:
        run.apply(step)
    run.finish(recipe_is_empty=not recipe.steps)
    return perplexity.take(run, SETTINGS).metrics["token_ppl"].value


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    "best_first",
    [
        ("", "sparsegpt(sparsity=0.5)", "wanda(sparsity=0.5)", "magnitude(sparsity=0.5)"),
        ("sparsegpt(pattern='2:4')", "wanda(pattern='2:4')", "magnitude(pattern='2:4')"),
        ("gptq()", "gptq(bits=3)", "rtn(bits=3)"),
    ],
    ids=["half of the weights", "2 of 4", "3 bits"],
)
def test_methods_rank_as_published(best_first: tuple[str, ...]) -> None:
    found = {steps: measure(steps) for steps in best_first}
    print({steps: round(value, 2) for steps, value in found.items()})
    assert sorted(found, key=found.__getitem__) == list(best_first), found
