"""Curriculum learning: from easy examples to hard ones (Bengio et al., 2009)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._difficulty import Difficulty, rate


@dataclass(frozen=True)
class Curriculum(Select):
    """Examples are read in the order of a difficulty, batch for batch, and again from the easiest in each epoch."""

    paper = "doi:10.1145/1553374.1553380"
    caveats = (
        "the paper's difficulties are those of its tasks; here the loss under the unchanged model, or the length",
    )
    type = "data selection"

    difficulty: Difficulty = "loss"  # mean loss of the learned tokens, or the number of tokens

    def order(self, examples: Sequence[Example], run: Run) -> Sequence[int]:
        return sorted(range(len(examples)), key=rate(examples, run, self.difficulty).__getitem__)
