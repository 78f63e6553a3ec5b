"""Example: rounds every weight to a grid of its output's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from effbench.core.kinds import Weights
from effbench.core.views import Layer
from effbench.nn.model.linear import rebuilt


@dataclass(frozen=True)
class Example(Weights):
    """What a reader of the paper should know first. Needs no data."""

    paper = "unpublished"  # or "arXiv:NNNN.NNNNN", and then published = "example()" or caveats = ("what differs",)
    identity = {"strength": 0.0}  # settings at which the model stays what it is

    bits: int = 4  # of a weight
    strength: float = 1.0  # how far weights move to the grid: 0 not at all, 1 all the way

    def check(self) -> None:
        self.require(self.bits >= 2, "bits must be at least 2")
        self.require(0 <= self.strength <= 1, "strength must be in [0, 1]")

    def compress(self, layer: Layer) -> nn.Module:
        """From `layer.weight` [out, in], float32, the module that takes the linear's place."""
        largest = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-8)
        step = largest / (2 ** (self.bits - 1) - 1)
        rounded = (layer.weight / step).round() * step
        weight = layer.weight + self.strength * (rounded - layer.weight)
        return rebuilt(layer.module, weight)  # stored dense; modules that store fewer bits are in `effbench.formats`
