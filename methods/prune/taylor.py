"""Taylor: the weights whose removal changes the loss least to first order, |w * dL/dw| go (Lee et al., 2019)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from effbench.core.method import Need
from effbench.core.views import Layer
from effbench.methods.prune._saliency import Patterned


@dataclass(frozen=True)
class Taylor(Patterned):
    """SNIP's connection sensitivity: the gradient is that of the mean loss over the calibration sequences.

    `average="magnitude"` averages |w * dL/dw| over the sequences instead, as Molchanov et al. (arXiv:1611.06440) do.
    """

    paper = "arXiv:1810.02340"
    weight_update = "none"
    identity = {"sparsity": 0.0}

    average: Literal["gradient", "magnitude"] = "gradient"  # what is averaged over the sequences

    @property
    def needs(self) -> Set[Need]:
        return {"grad" if self.average == "gradient" else "grad_abs"}

    def score(self, layer: Layer) -> Tensor:
        gradient = layer.inputs.grad.abs() if self.average == "gradient" else layer.inputs.grad_abs
        return layer.weight.abs() * gradient
