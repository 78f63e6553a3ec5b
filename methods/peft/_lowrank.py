"""What low-rank methods share: a product of thin matrices beside a linear, and the settings of those who train one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from effbench.core.kinds import Swap
from effbench.nn.model.adapters import NAMED, is_name, join_name
from effbench.nn.model.beside import Beside, Merge


class LowRankLinear(Beside):
    """D is a product of thin matrices; in training what it is applied to is dropped out."""

    output_factors: ClassVar[tuple[str, ...]] = ()  # factors on the side of the outputs, which LoRA+ trains faster

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.0, **common: Any) -> None:
        super().__init__(in_features, out_features, **common)
        self.dropout = dropout

    def read(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.dropout and self.training else x

    def config(self) -> dict[str, Any]:
        return super().config() | {"dropout": self.dropout}


class LoRALinear(LowRankLinear):
    """D = scaling * B A, A [rank, in], B [out, rank]."""

    output_factors = ("b",)

    def __init__(self, in_features: int, out_features: int, rank: int, scaling: float, **common: Any) -> None:
        super().__init__(in_features, out_features, **common)
        self.scaling = scaling
        self.a = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def delta(self) -> Tensor:
        return self.scaling * (self.b @ self.a)

    def add(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.scaling * nn.functional.linear(x, self.a), self.b)

    def config(self) -> dict[str, Any]:
        return super().config() | {"rank": len(self.a), "scaling": self.scaling}


@dataclass(frozen=True)
class Product(Swap):
    """Trains a product in the fit that follows and then merges it, as `merge` says (see LoRA), unless it has a name."""

    type = "PEFT"
    weight_update = "low rank"
    merges = stacks = True
    must_define = (("replace",),)

    rank: int = 16  # of the trained product
    dropout: float = 0.0  # of what the product reads, in training
    targets: Literal["all"] | tuple[str, ...] = "all"  # or names of linears such as ('q_proj', 'v_proj')
    merge: Merge = "masked"  # what becomes of the product after the fit
    adapter: str = ""  # a name to keep the product by, beside others; it is then not merged

    def check(self) -> None:
        self.require(self.rank > 0, "rank must be at least 1")
        self.require(0 <= self.dropout < 1, "dropout must be in [0, 1)")
        self.require(is_name(self.adapter), NAMED)

    @property
    def fills(self) -> tuple[str, ...]:
        return (join_name(self.key, self.adapter),) if self.adapter else ()  # without a name it is merged

    @property
    def beside(self) -> dict[str, Any]:
        """Settings of the module beside a linear that all of them have."""
        return {"dropout": self.dropout, "masked": self.merge == "masked", "adapter": self.adapter}

    def settle(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, Beside)
        return module.settle(self.merge)


@dataclass(frozen=True)
class LowRank(Product):
    """A product that counts by `alpha` and the rank."""

    provides = frozenset({"a low-rank step"})
    must_define = (("replace",),)

    alpha: float = 32.0  # the product counts alpha / rank times

    def check(self) -> None:
        super().check()
        self.require(self.alpha > 0, "alpha must be above 0")
