"""What selectors that aim at something share: the examples that the model is to become good at."""

from __future__ import annotations

from typing import Literal

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example

Aim = Literal["target", "validation"]


def find_target(method: Select, run: Run, aim: Aim) -> list[Example]:
    """The examples of the part aimed at. Raises `Usage` where the data has none."""
    examples = run.data.target if aim == "target" else run.data.validation
    method.require(bool(examples), f"{run.data.name} has no {aim} part to aim at: give data= that has one")
    return examples
