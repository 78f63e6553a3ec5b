"""LLaMA-Adapter: prompts that the upper layers attend to behind a gate that starts at zero (Zhang et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effbench.core.kinds import Swap
from effbench.core.run import Run
from effbench.core.views import Site
from effbench.nn.model.adapters import NAMED, add_part, is_name, join_name
from effbench.nn.model.attention import AttentionExtra
from effbench.nn.model.blocks import Blocks, project_keys

STEM = "llama_adapter"  # of its name in the attention module


class GatedPrompts(AttentionExtra):
    """Prompts [length, hidden] of one layer, and their gate: one number for each of `heads`, or one for all (0)."""

    undecayed = ("prompts",)

    def __init__(self, length: int, hidden: int, heads: int, adapter: str = "") -> None:
        super().__init__()
        self.adapter, self.heads = adapter, heads
        self.prompts = nn.Parameter(torch.zeros(length, hidden, dtype=torch.float32))
        self.gate = nn.Parameter(torch.zeros(heads or 1, dtype=torch.float32))

    def beside(self, query: Tensor, attention: nn.Module) -> Tensor:
        """The gate times softmax(Q K^T / sqrt(C)) V over the prompts alone (section 3.2), added to what attention
        to the tokens gives. Keys and values are those that the layer makes of prompts; keys have no position.
        """
        keys, values = project_keys(attention, self.prompts.to(query.dtype))  # [Hkv, L, D]
        groups = query.shape[1] // len(keys)
        keys, values = (part.repeat_interleave(groups, 0).to(query.dtype) for part in (keys, values))
        weights = (query @ keys.transpose(1, 2) * query.shape[-1] ** -0.5).float().softmax(-1)
        gate = self.gate.tanh() if self.heads else self.gate
        return (gate[:, None, None] * weights).to(query.dtype) @ values

    def config(self) -> dict[str, Any]:
        length, hidden = self.prompts.shape
        return {"length": length, "hidden": hidden, "heads": self.heads, "adapter": self.adapter}


@dataclass(frozen=True)
class LLaMAAdapter(Swap):
    """The prompts have a softmax of their own, so that with the gate at zero the model is what it was.

    `gate`: `head` is the tanh of a number for each head, as in the authors' code; `scalar` one number for each layer as
    it is, as in PEFT.
    """

    paper = "arXiv:2303.16199"
    published = "llama_adapter(length=10, layers=30), fit(lr=0.009, batch_size=64, warmup=0.4, weight_decay=0.02)"
    caveats = ("the paper tunes LLaMA on instructions for 5 epochs; 30 layers are all but two of its 32",)
    type = "PEFT"
    weight_update = "gated prompts"
    sites = ("attention",)
    stacks = True

    length: int = 10  # prompts of each layer
    layers: int = 30  # that have prompts, from the top; all where there are fewer
    gate: Literal["head", "scalar"] = "head"  # what the prompts' part is multiplied by
    adapter: str = ""  # a name to keep it by, beside others

    def check(self) -> None:
        self.require(min(self.length, self.layers) > 0, "length and layers must be at least 1")
        self.require(is_name(self.adapter), NAMED)

    @property
    def fills(self) -> tuple[str, ...]:
        return (join_name(STEM, self.adapter),)

    def prepare(self, run: Run) -> tuple[int, int, int]:
        """Blocks below those with prompts, the width of states, heads of queries."""
        config = run.model.config
        return len(Blocks(run.model)) - self.layers, config.hidden_size, config.num_attention_heads

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        below, hidden, heads = site.prepared
        if site.block is not None and site.block >= below:
            part = GatedPrompts(self.length, hidden, heads if self.gate == "head" else 0, self.adapter)
            nn.init.normal_(part.prompts)
            add_part(module, STEM, part)
        return module
