"""Trained keys and values in front of every layer's attention: what prefix tuning and P-Tuning v2 share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effbench.core.kinds import Swap
from effbench.core.run import Run
from effbench.core.views import Site
from effbench.nn.model.adapters import NAMED, add_part, is_name, join_name
from effbench.nn.model.attention import AttentionExtra
from effbench.nn.model.blocks import count_heads

STEM = "prefix"  # of its name in the attention module


class Prefix(AttentionExtra):
    """Keys and values [heads, length, width] of one layer; tokens stand behind them."""

    undecayed = ("keys", "values")

    def __init__(self, length: int, heads: int, width: int, adapter: str = "") -> None:
        super().__init__()
        self.positions, self.adapter = length, adapter
        self.keys = nn.Parameter(torch.zeros(heads, length, width, dtype=torch.float32))
        self.values = nn.Parameter(torch.zeros(heads, length, width, dtype=torch.float32))

    def make(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [heads, length, width] each."""
        return self.keys, self.values

    def before(self, query: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.make()
        return keys.expand(len(query), -1, -1, -1), values.expand(len(query), -1, -1, -1)

    def config(self) -> dict[str, Any]:
        heads, length, width = self.keys.shape
        return {"length": length, "heads": heads, "width": width, "adapter": self.adapter}


class Reparametrized(AttentionExtra):
    """A prefix P = MLP(P'): what all layers share of the MLP, and this layer's part of it."""

    def __init__(self, trunk: nn.Module, length: int, hidden: int, heads: int, width: int, adapter: str = "") -> None:
        super().__init__()
        self.positions, self.adapter = length, adapter
        self.trunk = trunk  # to [length, hidden]
        self.head = nn.Linear(hidden, 2 * heads * width)
        self.shape = (length, 2, heads, width)

    def make(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [heads, length, width] each."""
        made = self.head(self.trunk(torch.arange(self.positions, device=self.head.weight.device)))
        keys, values = made.view(self.shape).permute(1, 2, 0, 3)
        return keys, values

    def before(self, query: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.make()
        return keys.expand(len(query), -1, -1, -1), values.expand(len(query), -1, -1, -1)

    @torch.no_grad()
    def final(self) -> Prefix:
        """The prefix that it has learned to make."""
        length, _, heads, width = self.shape
        prefix = Prefix(length, heads, width, self.adapter).to(self.head.weight.device)
        keys, values = self.make()
        prefix.keys.data, prefix.values.data = keys.contiguous(), values.contiguous()
        prefix.active = self.active
        return prefix


@dataclass(frozen=True)
class Prefixes(Swap):
    """Keys and values in front, made by an MLP while they are trained, or trained as they are."""

    must_define = (("reparametrized",),)
    type = "PEFT"
    weight_update = "prefix"
    sites = ("attention",)
    stacks = True

    length: int = 20  # keys and values in front of each layer's
    hidden: int = 512  # width of the MLP
    adapter: str = ""  # a name to keep it by, beside others

    def check(self) -> None:
        self.require(min(self.length, self.hidden) > 0, "length and hidden must be at least 1")
        self.require(is_name(self.adapter), NAMED)

    @property
    def fills(self) -> tuple[str, ...]:
        return (join_name(STEM, self.adapter),)

    @property
    def reparametrized(self) -> bool:
        """Whether an MLP makes them while they are trained."""
        raise NotImplementedError

    def prepare(self, run: Run) -> nn.Module | None:
        if not self.reparametrized:
            return None
        width = run.model.get_input_embeddings().weight.shape[1]
        return nn.Sequential(nn.Embedding(self.length, width), nn.Linear(width, self.hidden), nn.Tanh()).to(run.device)

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        heads, width = count_heads(module)
        if self.reparametrized:
            made: nn.Module = Reparametrized(site.prepared, self.length, self.hidden, heads, width, self.adapter)
        else:
            made = Prefix(self.length, heads, width, self.adapter)
            for drawn in made.parameters():
                nn.init.normal_(drawn)  # as tables of embeddings are
        add_part(module, STEM, made)
        return module

    def settle(self, module: nn.Module) -> nn.Module:
        made = module.get_submodule(name := join_name(STEM, self.adapter))
        if isinstance(made, Reparametrized):
            setattr(module, name, made.final())
        return module
