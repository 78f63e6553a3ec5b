"""What curricula share: how hard examples are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.train.passes import score_losses

Difficulty = Literal["loss", "length"]


def rate(examples: Sequence[Example], run: Run, difficulty: Difficulty) -> list[float]:
    """How hard each is: the mean loss of its learned tokens under the unchanged model, or the number of its tokens."""
    if difficulty == "length":
        return [float(len(example.ids)) for example in examples]
    losses: list[float] = score_losses(run, "difficulty", run.reference, examples).tolist()
    return losses
