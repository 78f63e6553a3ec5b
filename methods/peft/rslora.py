"""rsLoRA: LoRA whose product counts alpha / sqrt(rank) times, so that large ranks learn, too (Kalajdzievski, 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from effbench.core.views import Site
from effbench.methods.peft._lowrank import LoRALinear, LowRank


class RsLoRALinear(LoRALinear):
    """LoRA's, with another scaling."""


@dataclass(frozen=True)
class RsLoRA(LowRank):
    """As LoRA otherwise: at one `alpha` the product counts sqrt(rank) times as much as LoRA's."""

    paper = "arXiv:2312.03732"
    caveats = ("on every linear; the paper compares ranks 4 to 2,048 on Llama 2 7B",)
    tuned = {"rank": (4, 16)}

    alpha: float = 32.0  # the product counts alpha / sqrt(rank) times

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        scaling = self.alpha / math.sqrt(self.rank)  # equation 3
        return RsLoRALinear.of(module, rank=self.rank, scaling=scaling, **self.beside)
