"""Random selection: the floor that every selector has to beat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example


@dataclass(frozen=True)
class RandomSelection(Select):
    """A uniform sample without replacement, the same for the same seed."""

    paper = "unpublished"
    type = "data selection"
    usual = 0.2

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        chance = random.Random(f"{run.seed}/random_selection")
        return torch.tensor([chance.random() for _ in examples])
