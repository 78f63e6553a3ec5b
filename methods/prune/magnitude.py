"""Magnitude: the smallest weights go (Han et al., 2015)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effbench.core.views import Layer
from effbench.methods.prune._saliency import Patterned


@dataclass(frozen=True)
class Magnitude(Patterned):
    """Needs no data. The baseline that every calibrated pruner has to beat; one threshold per matrix or per model."""

    paper = "arXiv:1506.02626"
    caveats = ("in one shot, the baseline of later papers; Han et al. prune and retrain in turns",)
    weight_update = "none"
    identity = {"sparsity": 0.0}
    trials = ({}, {"scope": "global"})

    def score(self, layer: Layer) -> Tensor:
        return layer.weight.abs()
