"""Uncertainty sampling: prompts whose answers the model is least certain of (Lewis & Gale, 1994)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effbench.methods.select._acquisition import Acquisition


@dataclass(frozen=True)
class Entropy(Acquisition):
    """The score is the entropy of what the model predicts, in nats."""

    paper = "doi:10.1007/978-1-4471-2099-5_1"
    caveats = ("the paper takes what is nearest to a probability of 0.5 of two classes: there, what has most entropy",)

    def judge(self, members: Sequence[Tensor]) -> Tensor:
        (logits,) = members
        return torch.special.entr(logits.double().softmax(-1)).sum(-1)
