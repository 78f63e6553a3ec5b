"""Block sparsity: square blocks of the smallest norm go as a whole (after Narang et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effbench.core.views import Layer
from effbench.methods.prune._saliency import Saliency


@dataclass(frozen=True)
class BlockSparse(Saliency):
    """Needs no data. Blocks are compared by their Frobenius norm, as magnitude pruning compares weights.

    The other saliencies prune blocks by the sum of their scores: `wanda(pattern='block:16x16')`. Block movement pruning
    (Lagunas et al., arXiv:2109.04838) is `movement(pattern='block:32x32'), fit()`.
    """

    paper = "arXiv:1711.02782"
    caveats = (
        "in one shot, by the norm of a block; Narang et al. prune by its largest weight, more and more while training",
    )
    weight_update = "none"
    identity = {"sparsity": 0.0}

    block: int = 16  # outputs and inputs of a block

    def check(self) -> None:
        self.require(self.block > 0, "block must be positive")
        super().check()

    @property
    def zeros(self) -> str:
        return f"block:{self.block}x{self.block}"

    def score(self, layer: Layer) -> Tensor:
        return layer.weight.square()  # a block's sum is its squared norm: the same order
