"""LoRA: a trainable product of two thin matrices beside every frozen linear (Hu et al., 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effbench.core.kinds import Swap
from effbench.core.views import Site
from effbench.nn.model.adapters import NAMED, is_name, join_name
from effbench.nn.model.beside import Beside, Merge


class LoRALinear(Beside):
    """D = scaling * B A, A [rank, in], B [out, rank]."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, dropout: float = 0.0, **common: Any
    ) -> None:
        super().__init__(in_features, out_features, **common)
        self.scaling, self.dropout = scaling, dropout
        self.a = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def delta(self) -> Tensor:
        return self.scaling * (self.b @ self.a)

    def add(self, x: Tensor) -> Tensor:
        return self.scaling * nn.functional.linear(nn.functional.linear(x, self.a), self.b)

    def read(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)

    def config(self) -> dict[str, Any]:
        return super().config() | {"rank": len(self.a), "scaling": self.scaling, "dropout": self.dropout}


@dataclass(frozen=True)
class LoRA(Swap):
    """Trains the product in the fit that follows and then merges it.

    `merge`: `masked` puts the sum into what stood there, whose zeros stay (the product is masked in training already,
    so nothing is lost; MaskLoRA, arXiv:2312.15230) and whose codes are rounded again; `dense` leaves one dense
    matrix, whatever stood there; `separate` keeps the product beside what stood there.
    """

    paper = "arXiv:2106.09685"
    caveats = ("on every linear; Hu et al. adapt queries and values, at rank 4 to 8",)
    type = "PEFT"
    weight_update = "low rank"
    tuned = {"rank": (4, 16)}
    provides = frozenset({"a low-rank step"})

    rank: int = 16  # of the trained product
    alpha: float = 32.0  # the product counts alpha / rank times
    dropout: float = 0.0  # of what the product reads, in training
    targets: Literal["all"] | tuple[str, ...] = "all"  # or names of linears such as ('q_proj', 'v_proj')
    merge: Merge = "masked"  # what becomes of the product after the fit
    adapter: str = ""  # a name to keep the product by, beside others; it is then not merged

    def check(self) -> None:
        self.require(self.rank > 0, "rank must be at least 1")
        self.require(self.alpha > 0, "alpha must be above 0")
        self.require(0 <= self.dropout < 1, "dropout must be in [0, 1)")
        self.require(is_name(self.adapter), NAMED)

    @property
    def fills(self) -> tuple[str, ...]:
        return (join_name("lora", self.adapter),) if self.adapter else ()  # without a name it is merged

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        scaling = self.alpha / self.rank
        masked = self.merge == "masked"
        return LoRALinear.of(
            module, rank=self.rank, scaling=scaling, dropout=self.dropout, masked=masked, adapter=self.adapter
        )

    def settle(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, LoRALinear)
        return module.settle(self.merge)
