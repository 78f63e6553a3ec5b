"""Example: trains on the longest examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example as TrainingExample


@dataclass(frozen=True)
class Example(Select):
    """What a reader of the paper should know first."""

    paper = "unpublished"  # or "arXiv:NNNN.NNNNN", and then published = "example()" or caveats = ("what differs",)
    identity = {"fraction": 1.0}  # settings at which every example stays

    fraction: float = 0.5  # of the examples that are kept

    def check(self) -> None:
        self.require(0 < self.fraction <= 1, "fraction must be in (0, 1]")

    def score(self, examples: Sequence[TrainingExample], run: Run) -> Tensor:
        """[N]: the larger, the more worth keeping."""
        return torch.tensor([len(example.ids) for example in examples])

    def order(self, examples: Sequence[TrainingExample], run: Run) -> Sequence[int]:
        """Indices of the examples kept, best first."""
        return super().order(examples, run)[: max(1, round(self.fraction * len(examples)))]
