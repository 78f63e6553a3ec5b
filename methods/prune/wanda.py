"""Wanda: the smallest |weight| times input norm go, output row by output row (Sun et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effbench.core.views import Layer
from effbench.methods.prune._common import Scope
from effbench.methods.prune._saliency import Patterned


@dataclass(frozen=True)
class Wanda(Patterned):
    """|W_ij| * ||X_j||_2 with the norm over all calibration tokens; what is kept is not updated."""

    paper = "arXiv:2306.11695"
    published = "wanda()"
    weight_update = "none"
    needs = {"norm"}
    identity = {"sparsity": 0.0}
    trials = ({}, {"pattern": "4:8"}, {"pattern": "block:16x16"})

    scope: Scope = "row"  # the published comparison group; the others are variants

    def score(self, layer: Layer) -> Tensor:
        return layer.weight.abs() * layer.inputs.norm
