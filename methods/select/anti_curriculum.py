"""Anti-curriculum: from hard examples to easy ones (Wu et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._difficulty import Difficulty, rate


@dataclass(frozen=True)
class AntiCurriculum(Select):
    """Examples are read from the hardest on, batch for batch, and again from the hardest in each epoch."""

    paper = "arXiv:2012.03107"
    caveats = (
        "the paper paces how much of the order may be drawn from, over images; here all of it is read, once an epoch",
        "the paper's difficulty is a score learned by many models; here the loss under the unchanged model, or length",
    )
    type = "data selection"

    difficulty: Difficulty = "loss"  # mean loss of the learned tokens, or the number of tokens

    def order(self, examples: Sequence[Example], run: Run) -> Sequence[int]:
        return sorted(range(len(examples)), key=rate(examples, run, self.difficulty).__getitem__, reverse=True)
