"""DoRA: LoRA turns the rows of a weight, and their magnitudes are trained by themselves (Liu et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effbench.core.views import Site
from effbench.methods.peft._lowrank import LoRALinear, LowRank
from effbench.nn.model.linear import dense_weight
from effbench.nn.precision import widen


def row_norms(matrix: Tensor) -> Tensor:
    """[out] Euclidean norms; that of a row of zeros is the least positive number."""
    return torch.linalg.vector_norm(matrix, dim=1).clamp(min=torch.finfo(matrix.dtype).tiny)


class DoRALinear(LoRALinear):
    """W' = m V / ||V|| with V = W + scaling * B A (equation 5): magnitudes m [out], norms of rows [in]."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.m = nn.Parameter(row_norms(dense_weight(self.base)))  # of what is decoded, so that W' is W at the start

    def gains(self, direction: Tensor) -> Tensor:
        """m / ||V|| [out]. The norm is a constant in the backward pass (section 4.3)."""
        return self.m / row_norms(direction)

    def dense_weight(self) -> Tensor:
        direction = super().dense_weight()
        return self.gains(direction).detach().unsqueeze(1) * direction if self.active else direction

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            direction = super().dense_weight()
        gains, wide = self.gains(direction), widen(x)
        read = self.read(wide)
        if read is wide:
            return gains * (y + self.added(read))
        # As the authors' code: dropout is on all that training changes, and W x itself stays whole.
        return y + (gains - 1) * self.base(read.to(x.dtype)) + gains * self.added(read)


@dataclass(frozen=True)
class DoRA(LowRank):
    """As LoRA otherwise. Magnitudes are merged with the product, and masks keep the zeros of what stood there."""

    paper = "arXiv:2402.09353"
    caveats = ("on every linear; Liu et al. adapt q, k, v, up and down of LLaMA, at rank 16 or 32 and alpha 2 rank",)
    weight_update = "low rank, magnitudes"
    tuned = {"rank": (4, 16)}

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        return DoRALinear.of(module, rank=self.rank, scaling=self.alpha / self.rank, **self.beside)
