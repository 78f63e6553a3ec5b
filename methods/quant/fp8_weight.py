"""FP8 weights: 8-bit floats (E4M3), one scale per row or per tensor (Micikevicius et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from effbench.core.kinds import Weights
from effbench.core.views import Layer
from effbench.formats.float8 import FP8Linear


@dataclass(frozen=True)
class FP8Weight(Weights):
    """Needs no data. The largest weight of each row (or matrix) becomes 448, the largest E4M3 number.

    With `activations`, inputs are rounded to E4M3 as well, scaled per token (or per tensor) as they come: one scale for
    a tensor is one for all rows of a batch and their padding, so that a row's numbers depend on its company.
    """

    paper = "arXiv:2209.05433"
    published = "fp8_weight()"
    caveats = ("8-bit activations beside 8-bit weights, unless activations=False",)
    type = "PTQ"
    weight_update = "none"
    trials = ({}, {"granularity": "tensor", "activations": False})

    granularity: Literal["tensor", "row"] = "row"  # what shares a scale
    activations: bool = True  # round the inputs of the linears as well

    @property
    def rounds_activations(self) -> bool:
        return self.activations

    def compress(self, layer: Layer) -> nn.Module:
        per_row = self.granularity == "row"
        activations = ("token" if per_row else "tensor") if self.activations else "none"
        # Zero is an E4M3 number, so pruned weights stay zero.
        rounded = FP8Linear.from_weight(layer.weight, per_row=per_row, activations=activations, bias=layer.bias)
        return rounded.hold(layer.kept)
