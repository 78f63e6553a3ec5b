"""The one owner of attention, in training and inference alike.

transformers calls `attend` for every layer once `own_attention(model, plan)` is entered. The plan's chains decide what
happens: `attend_mask` narrows the mask, `attend_extra` adds keys and values in front (prefixes, adapters),
`attend_observe` sees the attention weights, and the slot `rope` rotates keys that were cached unrotated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from effbench.core.run import InferPlan
from effbench.nn.model.blocks import Blocks

NAME = "effbench"
_PLAN = "_effbench_plan"


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
    for extra in plan.chain("attend_extra"):
        more_keys, more_values = extra(module, query)
        key = torch.cat([more_keys, key], dim=2)
        value = torch.cat([more_values, value], dim=2)
        mask = nn.functional.pad(mask, (more_keys.shape[2], 0), value=True)
    if scaling is None:
        scaling = float(query.shape[-1] ** -0.5)
    observers = plan.chain("attend_observe")
    if not observers:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=scaling, enable_gqa=heads != key.shape[1]
        )
        return out.transpose(1, 2).contiguous(), None
    repeats = heads // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scaling
    # A query that sees nothing (padding) gets zeros, as in the fused kernel.
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num().to(query.dtype)
    for observe in observers:
        observe(module, weights)
    weights = nn.functional.dropout(weights, dropout, module.training)
    out = weights @ value.repeat_interleave(repeats, 1)
    return out.transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, attend)
# Without a mask function of the same name transformers passes no mask and padding would be looked at.
AttentionMaskInterface.register(NAME, sdpa_mask)


def changes_attention(plan: InferPlan) -> bool:
    """Whether the plan changes attention at all; if not, the model keeps its own implementation."""
    chains = ("attend_mask", "attend_extra", "attend_observe")
    return any(plan.chain(name) for name in chains) or plan.slot("rope") is not None


@contextlib.contextmanager
def own_attention(model: Any, plan: InferPlan) -> Iterator[None]:
    """Route the model's attention through `attend` with `plan`, and restore it."""
    view = Blocks(model)
    modules = [block.get_submodule(view.names.attention) for block in view.blocks]
    for module in modules:
        setattr(module, _PLAN, plan)
    try:
        with route_attention(model, NAME):
            yield
    finally:
        for module in modules:
            delattr(module, _PLAN)


@contextlib.contextmanager
def route_attention(model: Any, name: str) -> Iterator[None]:
    """Route the model's attention through the function registered as `name`, and restore it."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
