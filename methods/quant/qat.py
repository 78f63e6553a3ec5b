"""QAT: train with rounded weights, and let gradients pass through the rounding (Jacob et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from effbench.core.kinds import Swap
from effbench.core.run import Run
from effbench.core.views import Site
from effbench.formats.grid import WIDTHS
from effbench.methods.quant._fake import FakeQuantLinear, training_all


@dataclass(frozen=True)
class QAT(Swap):
    """In the fit that follows every linear of the blocks computes with the weights that it will be packed with.

    r -> S (q - Z) with q = clamp(round(r / S) + Z), equations 1 and 12 of the paper. The range is that of the weights
    themselves, found anew in each step (its section 3.1). Backwards the rounding counts as the identity and the clamp
    does not: the gradient is 1 where the code lies inside of the range and 0 outside (Bengio et al., arXiv:1308.3432).
    All that is trainable is trained; embeddings and the head are not rounded.
    """

    paper = "arXiv:1712.05877"
    caveats = ("weights alone, in groups; Jacob et al. round to 8 bits per matrix, activations too",)
    type = "QAT"
    weight_update = "training"
    tuned = {"symmetric": (True, False)}
    trials = ({}, {"bits": 2}, {"bits": 3, "symmetric": False}, {"bits": 8, "group_size": 48})

    bits: int = 4  # of a weight: 2, 3, 4 or 8
    group_size: int = 128  # consecutive inputs that share a scale; the last may be fewer
    symmetric: bool = True  # zero in the middle of the codes instead of a zero-point of its own

    def check(self) -> None:
        self.require(self.bits in WIDTHS, f"bits must be one of {WIDTHS}")
        self.require(self.group_size > 0, "group_size must be positive")

    def apply(self, run: Run) -> None:
        with training_all(run):
            super().apply(run)

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        return FakeQuantLinear.of(
            module, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric, grid="gptq"
        )

    def settle(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, FakeQuantLinear)
        return module.pack(module.base.weight.dtype)
