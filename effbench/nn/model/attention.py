"""The one owner of attention, in training and inference alike.

transformers calls `attend` for every layer once `own_attention(model, plan)` is entered. What was trained belongs to
the attention module that it was trained in, as a child (`AttentionExtra`), and is saved and measured with it. What a
plan changes lives as long as the plan: `attend_mask` narrows the mask, `attend_observe` sees the attention weights, and
the slot `rope` rotates keys that were cached unrotated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from effbench.core.run import InferPlan
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import Added, find_inner

NAME = "effbench"
_PLAN = "_effbench_plan"


class AttentionExtra(Added):
    """A child of an attention module that takes part in its attention: prefixes, adapters."""

    positions = 0  # that it takes; tokens stand behind them

    def before(self, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, Hkv, L, D] in front of all others, which every query [B, Hq, T, D] sees."""
        return None

    def beside(self, query: Tensor) -> Tensor | None:
        """What is added to the attention's output, [B, Hq, T, D]."""
        return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the plan's chains. query [B, Hq, T, D]; key, value [B, Hkv, S, D]; returns [B, T, Hq, D].

    `attention_mask` is bool [B, 1 or Hq, T, S], True where a query may look; None is causal.
    """
    plan: InferPlan = getattr(module, _PLAN)
    batch, heads, length, _ = query.shape
    rotate = plan.slot("rope")
    if rotate is not None:
        query, key = rotate(module, query, key, kwargs.get("position_ids"))
    mask = attention_mask
    if mask is None:
        size = key.shape[2]
        mask = torch.ones(length, size, dtype=torch.bool, device=query.device).tril(size - length)[None, None]
    mask = mask.expand(batch, -1, -1, -1)
    for narrow in plan.chain("attend_mask"):
        mask = mask & narrow(module, mask)
    extras = find_extras(module)
    for more_keys, more_values in filter(None, [extra.before(query) for extra in extras]):
        key = torch.cat([more_keys.to(key.dtype), key], dim=2)
        value = torch.cat([more_values.to(value.dtype), value], dim=2)
        mask = nn.functional.pad(mask, (more_keys.shape[2], 0), value=True)
    added = [part for extra in extras if (part := extra.beside(query)) is not None]
    if scaling is None:
        scaling = float(query.shape[-1] ** -0.5)
    observers = plan.chain("attend_observe")
    if not observers:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=scaling, enable_gqa=heads != key.shape[1]
        )
        return sum(added, out).transpose(1, 2).contiguous(), None
    repeats = heads // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scaling
    # A query that sees nothing (padding) gets zeros, as in the fused kernel.
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num().to(query.dtype)
    for observe in observers:
        observe(module, weights)
    weights = nn.functional.dropout(weights, dropout, module.training)
    out = sum(added, weights @ value.repeat_interleave(repeats, 1))
    return out.transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, attend)
# Without a mask function of the same name transformers passes no mask and padding would be looked at.
AttentionMaskInterface.register(NAME, sdpa_mask)


def find_extras(attention: nn.Module) -> list[AttentionExtra]:
    """What takes part in the attention of a module now."""
    return [child for child in attention.children() if isinstance(child, AttentionExtra) and child.active]


def list_attention(model: nn.Module) -> list[nn.Module]:
    """The attention modules of all blocks that have one, inside of what stands round them."""
    view = Blocks(model)
    found = [getattr(block, view.names.attention, None) for block in view.blocks]
    return [find_inner(module) for module in found if module is not None]


def count_prefix(model: nn.Module) -> int:
    """Positions that stand before the first token, in the attention of every block."""
    return sum(extra.positions for first in list_attention(model)[:1] for extra in find_extras(first))


def changes_attention(model: nn.Module, plan: InferPlan) -> bool:
    """Whether attention is not the model's own, which it keeps otherwise."""
    chained = any(plan.chain(name) for name in ("attend_mask", "attend_observe")) or plan.slot("rope") is not None
    return chained or any(map(find_extras, list_attention(model)))


@contextlib.contextmanager
def own_attention(model: Any, plan: InferPlan) -> Iterator[None]:
    """Route the model's attention through `attend` with `plan` where anything changes it, and restore it."""
    if not changes_attention(model, plan):
        yield
        return
    modules = list_attention(model)
    before = [vars(module).get(_PLAN) for module in modules]
    for module in modules:
        setattr(module, _PLAN, plan)
    try:
        with route_attention(model, NAME):
            yield
    finally:
        for module, outer in zip(modules, before, strict=True):
            setattr(module, _PLAN, outer)


def attending(model: Any) -> AbstractContextManager[None]:
    """Have what was trained in the model's attention take part in it, if it does not already under some plan."""
    if model.config._attn_implementation == NAME:
        return contextlib.nullcontext()
    return own_attention(model, InferPlan())


@contextlib.contextmanager
def route_attention(model: Any, name: str) -> Iterator[None]:
    """Route the model's attention through the function registered as `name`, and restore it."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
