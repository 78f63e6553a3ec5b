"""Diversity by determinants: a set is the likelier, the larger the volume that its embeddings span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._diverse import score_places
from effbench.methods.select._kdpp import build_kernel, rank
from effbench.nn.embedders import list_files
from effbench.nn.train.embeddings import embed


@dataclass(frozen=True)
class DPP(Select):
    """A determinantal point process of the size that is kept (section 5.2 of the paper): P(Y) ~ det(L_Y).

    L holds the similarities of embedded examples. Behind the chosen ones the rest is ranked by the variance that these
    leave them.
    """

    paper = "arXiv:1207.6083"
    caveats = (
        "all examples count as equally good: L is their similarity alone",
        "a Gaussian kernel by default: inner products, as in the paper, have no more than as many examples as features",
    )
    type = "data selection"
    usual = 0.2
    trials = ({}, {"draw": "greedy"})

    draw: Literal["sample", "greedy"] = "sample"  # exactly, or the one that adds most to the determinant each time
    kernel: Literal["gaussian", "cosine"] = "gaussian"  # the first as wide as the median distance
    by: str = "model"  # what embeds: the model itself, all-minilm-l6-v2, or a folder of sentence-transformers

    def files(self) -> tuple[Path, ...]:
        return list_files(self.by)

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        kernel = build_kernel(embed(run, examples, self.by), self.kernel)
        return score_places(rank(kernel, self.count(run), self.draw, run.seed))
