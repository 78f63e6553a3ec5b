"""Adapters: a bottleneck with a skip connection behind attention and behind the MLP (Houlsby et al., 2019)."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.core.kinds import Swap
from effbench.core.run import Run
from effbench.core.views import Site
from effbench.methods.peft._bottleneck import Bottleneck
from effbench.nn.model.adapters import NAMED, check_once, is_name, join_name
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import Around, find_inner
from effbench.nn.precision import widen

STD = 1e-2  # of the weights at the start, which are drawn again beyond two of it
gelu = functools.partial(nn.functional.gelu, approximate="tanh")


class SerialAdapter(Around):
    """h + f(h W_down) W_up of what the module inside gives (figure 2 of the paper), before it joins the residual."""

    def __init__(self, inner: nn.Module, hidden: int, width: int, adapter: str = "") -> None:
        super().__init__(inner)
        self.adapter, self.hidden, self.width = adapter, hidden, width
        self.bottleneck = Bottleneck(hidden, width, gelu)
        for linear in (self.bottleneck.down, self.bottleneck.up):
            nn.init.trunc_normal_(linear.weight, std=STD, a=-2 * STD, b=2 * STD)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        if not self.active:
            return out
        h: Tensor = out if isinstance(out, Tensor) else out[0]
        h = h + self.bottleneck(h).to(h.dtype)
        return h if isinstance(out, Tensor) else (h, *out[1:])

    def config(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "width": self.width, "adapter": self.adapter}


class OwnNorm(Around):
    """A norm with weights of the adapter's own, which begin as those of the model's."""

    weight = bias = None  # nothing may be folded into a norm that is one of several

    def __init__(self, inner: nn.Module, adapter: str = "") -> None:
        super().__init__(inner)
        self.adapter = adapter
        self.own = copy.deepcopy(find_inner(inner)).float().requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.inner(x)
        return self.own(widen(x)).to(x.dtype)

    def config(self) -> dict[str, Any]:
        return {"adapter": self.adapter}


@dataclass(frozen=True)
class Adapter(Swap):
    """Two adapters in each layer, near the identity at the start; norms are trained with them."""

    paper = "arXiv:1902.00751"
    published = "adapter(width=64), fit(lr=0.0003, batch_size=32, schedule='linear', warmup=0.1)"
    caveats = ("width and rate are among those that the paper tunes per task, on BERT with norms behind the sums",)
    type = "PEFT"
    weight_update = "adapter"
    stacks = True

    width: int = 64  # of the bottlenecks
    norms: bool = True  # train the model's norms too
    adapter: str = ""  # a name to keep it by, beside others

    def check(self) -> None:
        self.require(self.width > 0, "width must be at least 1")
        self.require(is_name(self.adapter), NAMED)

    sites = ("attention", "mlp", "norm")

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({"attention", "mlp", *(["norm"] if self.norms else [])})

    @property
    def fills(self) -> tuple[str, ...]:
        return (join_name("adapter", self.adapter),) if self.adapter else ()  # those without a name stand in a row

    def prepare(self, run: Run) -> int:
        names = Blocks(run.model).names
        if not names.mlp:
            raise Unsupported(f"blocks hold their MLP loose ({names.up[0]}, {names.down}): no adapter stands behind it")
        return int(run.model.config.hidden_size)

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        if site.kind == "norm":
            check_once(module, OwnNorm, self.adapter)
            return OwnNorm(module, self.adapter) if any(True for _ in module.parameters()) else module
        check_once(module, SerialAdapter, self.adapter)
        return SerialAdapter(module, site.prepared, self.width, self.adapter)

    def settle(self, module: nn.Module) -> nn.Module:
        return module.own if isinstance(module, OwnNorm) and not self.adapter else module
