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
    identity = {"keep": 1.0}  # settings at which every example stays
    usual = 0.5  # share of the pool that is kept where the recipe does not say: keep=0.1

    def score(self, examples: Sequence[TrainingExample], run: Run) -> Tensor:
        """[N]: the larger, the more worth keeping. `order` and `admit` are other ways, see `Select`."""
        return torch.tensor([len(example.ids) for example in examples])
