"""Example: trains one factor for every input of a frozen linear, and multiplies it into the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effbench.core.kinds import Swap
from effbench.core.views import Site
from effbench.nn.model.linear import Replaced, dense_weight, kept, rebuilt


class ScaledInputs(Replaced):
    """A frozen linear whose inputs are multiplied by trained factors."""

    def __init__(self, base: nn.Module, limit: float) -> None:
        weight = dense_weight(base)
        super().__init__(weight.shape[1], weight.shape[0])
        self.base = base
        self.limit = limit
        self.change = nn.Parameter(torch.zeros(weight.shape[1]))

    def factor(self) -> Tensor:
        """[in]: 1 before training."""
        return 1 + self.limit * self.change.tanh()

    def dense_weight(self) -> Tensor:
        return dense_weight(self.base) * self.factor().detach()

    def kept(self) -> Tensor | None:
        return kept(self.base)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x * self.factor())
        return output


@dataclass(frozen=True)
class Example(Swap):
    """What a reader of the paper should know first."""

    paper = "unpublished"  # or "arXiv:NNNN.NNNNN", and then published = "example()" or caveats = ("what differs",)
    identity = {"limit": 0.0}  # settings at which the model stays what it is

    limit: float = 0.5  # factors stay within 1 - limit and 1 + limit

    def check(self) -> None:
        self.require(0 <= self.limit < 1, "limit must be in [0, 1)")

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        """The trainable module that takes the place of a linear; all else is frozen."""
        return ScaledInputs(module, self.limit)

    def settle(self, module: nn.Module) -> nn.Module:
        """What stands there after the fit: here a linear like the one before."""
        assert isinstance(module, ScaledInputs)
        return rebuilt(module.base, module.dense_weight())
