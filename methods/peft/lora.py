"""LoRA: a trainable product of two thin matrices beside every frozen linear (Hu et al., 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.core.kinds import Swap
from effbench.nn.model.linear import Replaced, dense_weight, kept, make_linear, rebuilt


class LoRALinear(Replaced):
    """y = base(x) + scaling * dropout(x) A^T B^T, A [rank, in], B [out, rank], kept in float32.

    `masked`: where the base holds a weight at zero, so does the sum; the product is masked while it is trained, too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        masked: bool = False,
        bias: bool = False,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.base = nn.Linear(in_features, out_features, bias=False) if base is None else base
        self.scaling, self.dropout, self.masked = scaling, dropout, masked
        self.a = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))

    @classmethod
    def beside(cls, base: nn.Module, rank: int, scaling: float, dropout: float, masked: bool) -> LoRALinear:
        """Stand in front of `base`, frozen; its bias moves here."""
        if isinstance(base, Conv1D):
            base = rebuilt(base, dense_weight(base))
        out_features, in_features = base.out_features, base.in_features
        module = cls(in_features, out_features, rank, scaling, dropout, masked, base=base)  # type: ignore[arg-type]
        base.requires_grad_(False)
        module.bias, base.bias = base.bias, None  # type: ignore[assignment]
        return module

    def product(self, mask: Tensor | None) -> Tensor:
        """What is added to the weight, [out, in], where `mask` (all of it if None) is True."""
        delta = self.scaling * (self.b @ self.a)
        return delta if mask is None else delta * mask

    def dense_weight(self) -> Tensor:
        return dense_weight(self.base) + self.product(self.kept()).detach()

    def kept(self) -> Tensor | None:
        return kept(self.base) if self.masked else None

    def rebuilt(self, weight: Tensor) -> nn.Module:
        module = rebuilt(self.base, weight)
        module.bias = self.bias  # type: ignore[assignment]
        return module

    def dense(self) -> nn.Linear:
        """One plain linear that computes the same."""
        return make_linear(self.dense_weight(), self.bias)

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "rank": len(self.a),
            "scaling": self.scaling,
            "dropout": self.dropout,
            "masked": self.masked,
        }

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        dropped = nn.functional.dropout(x.to(self.a.dtype), self.dropout, self.training)
        mask = self.kept()
        if mask is None:  # two thin products instead of a whole matrix
            delta = self.scaling * nn.functional.linear(nn.functional.linear(dropped, self.a), self.b)
        else:
            delta = nn.functional.linear(dropped, self.product(mask))
        y = y + delta.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


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

    rank: int = 16  # of the trained product
    alpha: float = 32.0  # the product counts alpha / rank times
    dropout: float = 0.0  # of what the product reads, in training
    targets: Literal["all"] | tuple[str, ...] = "all"  # or names of linears such as ('q_proj', 'v_proj')
    merge: Literal["masked", "dense", "separate"] = "masked"  # what becomes of the product after the fit

    def check(self) -> None:
        self.require(self.rank > 0, "rank must be at least 1")
        self.require(self.alpha > 0, "alpha must be above 0")
        self.require(0 <= self.dropout < 1, "dropout must be in [0, 1)")

    def replace(self, module: nn.Module) -> nn.Module:
        return LoRALinear.beside(module, self.rank, self.alpha / self.rank, self.dropout, self.merge == "masked")

    def settle(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, LoRALinear)
        if self.merge == "separate":
            return module
        return module.dense() if self.merge == "dense" else module.rebuilt(module.dense_weight())
