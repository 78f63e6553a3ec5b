"""LoRA: a trainable product of two thin matrices beside every frozen linear (Hu et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from effbench.core.views import Site
from effbench.methods.peft._lowrank import LoRALinear, LowRank


@dataclass(frozen=True)
class LoRA(LowRank):
    """Trains the product in the fit that follows and then merges it.

    `merge`: `masked` puts the sum into what stood there, whose zeros stay (the product is masked in training already,
    so nothing is lost; MaskLoRA, arXiv:2312.15230) and whose codes are rounded again; `dense` leaves one dense
    matrix, whatever stood there; `separate` keeps the product beside what stood there.
    """

    paper = "arXiv:2106.09685"
    caveats = ("on every linear; Hu et al. adapt queries and values, at rank 4 to 8",)
    tuned = {"rank": (4, 16)}

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        return LoRALinear.of(module, rank=self.rank, scaling=self.alpha / self.rank, **self.beside)
