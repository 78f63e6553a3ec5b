"""Variation ratio: prompts whose likeliest answer is the least likely (Freeman, 1965)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from effbench.methods.select._acquisition import Acquisition


@dataclass(frozen=True)
class VariationRatio(Acquisition):
    """The score is 1 - max_y p(y | x): the share of answers that are not the mode."""

    paper = "Freeman, 1965, Elementary Applied Statistics"
    caveats = ("a statistic of counts in the book; here of what the model predicts, as in arXiv:1703.02910",)

    def judge(self, members: Sequence[Tensor]) -> Tensor:
        (logits,) = members
        return 1 - logits.double().softmax(-1).amax(-1)
