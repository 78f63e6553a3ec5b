"""BALD: prompts about whose answers the members of an ensemble disagree (Houlsby et al., 2011; Gal et al., 2017)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effbench.core.run import Run
from effbench.methods.select._acquisition import Acquisition, Row, dropping, read, thin


@dataclass(frozen=True)
class BALD(Acquisition):
    """The score is the mutual information of answer and weights, H[E p] - E H[p] (equation 2 of arXiv:1112.5745).

    The expectation is over passes with dropout (arXiv:1506.02142), put on what attention and MLP of each block give,
    or over prompts with words left out.
    """

    paper = "arXiv:1703.02910"
    caveats = ("the paper's models are trained with dropout; here it is put on a model that need not have been",)
    trials = ({"samples": 3},)

    samples: int = 10  # members of the ensemble
    ensemble: Literal["dropout", "prompts"] = "dropout"  # members differ in a mask of dropout, or in tokens left out
    rate: float = 0.1  # of dropout: one mask for a whole pass; or of the tokens of a prompt that are left out

    def check(self) -> None:
        super().check()
        self.require(self.samples > 1, "samples must be at least 2: one member agrees with itself")
        self.require(0 < self.rate < 1, "rate must be in (0, 1)")

    def members(self, rows: Sequence[Row], run: Run) -> Iterator[Tensor]:
        for member in range(self.samples):
            if self.ensemble == "prompts":
                yield read([thin(row, self.rate, run, member) for row in rows], run)
                continue
            with dropping(run, self.rate, member):
                states = read(rows, run)
            yield states

    def judge(self, members: Sequence[Tensor]) -> Tensor:
        mean, within = torch.zeros(()), torch.zeros(())  # E p, and E H[p]
        for logits in members:
            p = logits.double().softmax(-1)
            mean = mean + p / len(members)
            within = within + entropy(p) / len(members)
        return entropy(mean) - within


def entropy(p: Tensor) -> Tensor:
    """[n]: entropies of distributions [n, V], in nats."""
    return torch.special.entr(p).sum(-1)
