"""Taylor: the weights whose removal changes the loss least to first order, |w * dL/dw| go (Molchanov et al., 2017)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from effbench.core.method import Need
from effbench.core.views import Layer
from effbench.methods.prune._common import Scope
from effbench.methods.prune._saliency import Patterned


@dataclass(frozen=True)
class Taylor(Patterned):
    """Magnitudes of w * dL/dw, averaged over the calibration sequences, so that opposite signs do not cancel.

    SNIP (arXiv:1810.02340) averages the gradient first, and its single threshold is over the model too:
    `taylor(average='gradient')`. n:m patterns compare within a row: `taylor(pattern='2:4', scope='local')`.
    """

    paper = "arXiv:1611.06440"
    caveats = ("weights in one shot; Molchanov et al. remove feature maps, normalise by layer and train in between",)
    weight_update = "none"
    identity = {"sparsity": 0.0}
    trials = ({}, {"average": "gradient"}, {"scope": "local", "pattern": "2:4"})

    scope: Scope = "global"  # one ranking of the whole model, as published; "local" and "row" are variants
    average: Literal["gradient", "magnitude"] = "magnitude"  # what is averaged over the sequences

    @property
    def needs(self) -> Set[Need]:
        return {"grad" if self.average == "gradient" else "grad_abs"}

    def score(self, layer: Layer) -> Tensor:
        gradient = layer.inputs.grad.abs() if self.average == "gradient" else layer.inputs.grad_abs
        return layer.weight.abs() * gradient
