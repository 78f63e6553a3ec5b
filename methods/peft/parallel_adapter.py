"""Scaled parallel adapters: a bottleneck beside every MLP, which reads what the MLP reads (He et al., 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effbench.core.kinds import Swap
from effbench.core.run import Run
from effbench.core.views import Site
from effbench.methods.peft._bottleneck import Bottleneck
from effbench.nn.model.adapters import NAMED, check_once, is_name, join_name
from effbench.nn.model.linear import Around


class ParallelBottleneck(Around):
    """FFN(x) + s ReLU(x W_down) W_up, table 1 of the paper; `scale` 0: s is trained, from 0, and W_up is not zero."""

    def __init__(self, inner: nn.Module, hidden: int, width: int, scale: float, adapter: str = "") -> None:
        super().__init__(inner)
        self.adapter, self.hidden, self.width, self.scale = adapter, hidden, width, scale
        self.bottleneck = Bottleneck(hidden, width, nn.functional.relu)
        nn.init.kaiming_uniform_(self.bottleneck.down.weight, a=math.sqrt(5))
        if scale:
            nn.init.zeros_(self.bottleneck.up.weight)
        else:
            nn.init.kaiming_uniform_(self.bottleneck.up.weight, a=math.sqrt(5))
            self.s = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        if not self.active:
            return out
        return out + ((self.scale or self.s) * self.bottleneck(x)).to(out.dtype)

    def config(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "width": self.width, "scale": self.scale, "adapter": self.adapter}


@dataclass(frozen=True)
class ParallelAdapter(Swap):
    """The adapter's sum is scaled by a fixed s, and it is the up-projection that starts at zero."""

    paper = "arXiv:2110.04366"
    published = "parallel_adapter(width=512), fit(lr=5e-05, schedule='linear', warmup=0.0, weight_decay=0.01)"
    caveats = ("the paper summarises and translates with BART and mBART",)
    type = "PEFT"
    weight_update = "adapter"
    sites = ("mlp",)
    stacks = True

    width: int = 64  # of the bottleneck
    # What the adapter is multiplied by; 'learned': by a number that is trained from 0, with nothing else zero at the
    # start.
    scale: float | Literal["learned"] = 4.0
    adapter: str = ""  # a name to keep it by, beside others

    def check(self) -> None:
        self.require(self.width > 0, "width must be at least 1")
        self.require(self.scale == "learned" or float(self.scale) != 0, "scale must not be 0")
        self.require(is_name(self.adapter), NAMED)

    @property
    def fills(self) -> tuple[str, ...]:
        return (join_name("parallel_adapter", self.adapter),) if self.adapter else ()  # others stand side by side

    def prepare(self, run: Run) -> int:
        return int(run.model.config.hidden_size)

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        check_once(module, ParallelBottleneck, self.adapter)
        scale = 0.0 if self.scale == "learned" else self.scale
        return ParallelBottleneck(module, site.prepared, self.width, scale, self.adapter)
