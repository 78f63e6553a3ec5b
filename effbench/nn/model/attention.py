"""The one owner of attention, in training and inference alike.

transformers calls `attend` for every layer once `own_attention(model, plan, cache)` is entered. What was trained
belongs to the attention module that it was trained in, as a child (`AttentionExtra`), and is saved and measured with
it. A cache whose layers settle says which slots a query sees, takes note of what its methods observe and, under the
slot `rope` of the plan, where keys and queries are rotated to. The chain `attend_observe` sees all attention weights,
`attend_scores` what they are the softmax of.

What was trained may say how keys and values are held (`AttentionExtra.holds`), as they are before keys are rotated:
then they are so in every pass, and a cache holds them so (`adopt`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from effbench.core.errors import Unsupported
from effbench.core.run import InferPlan
from effbench.core.views import Codec
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import Added, find_inner
from effbench.nn.model.rotary import Unrotated, has_rotary, rotate, unrotated

NAME = "effbench"
SLOTS = "effbench-slots"  # the same, where the cache says what queries see
QUERIES = 128  # whose attention weights are in memory at a time, where a cache observes them
_BOUND = "_effbench_bound"


class Layer(Protocol):
    """What a layer of a cache that settles is to attention; see `effbench.nn.infer.cache`."""

    @property
    def observing(self) -> bool:
        """Whether it is told of all attention that its slots receive."""

    @property
    def at_once(self) -> bool:
        """Whether keys and values of this pass have been encoded already."""

    def mask(self, window: int | None) -> Tensor | None:
        """bool [B, Hkv or 1, T, S]: what queries see, `window` tokens back at most; None: all up to their own."""

    def observe(self, weights: Tensor) -> None:
        """Count in attention [B, Hkv, G, T, S] from the queries of each group of heads."""

    def remember(self, query: Tensor, scaling: float) -> None:
        """Take note of queries [B, Hq, T, D]."""

    def ranks(self) -> tuple[Tensor, Tensor]:
        """Where keys [B, Hkv or 1, S] and queries [B, Hkv or 1, T] stand; under `rope` among the slots held."""


class Bound(NamedTuple):
    """What attention goes by for a while."""

    plan: InferPlan
    layers: list[Layer] | None  # of a cache that settles
    rotary: Unrotated | None  # which turns unrotated queries and keys


class AttentionExtra(Added):
    """A child of an attention module that takes part in its attention: prefixes, adapters, quantizers."""

    positions = 0  # that it takes; tokens stand behind them
    holds = False  # whether it says how keys and values are held; `hold` and `codecs` do it alike

    def hold(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, before they are rotated, and values [B, Hkv, T, D] as they come back from where they are held."""
        return key, value

    def codecs(self) -> tuple[Codec | None, Codec | None]:
        """How a cache holds them."""
        raise NotImplementedError

    def before(self, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, Hkv, L, D] in front of all others, which every query [B, Hq, T, D] sees."""
        return None

    def beside(self, query: Tensor, attention: nn.Module) -> Tensor | None:
        """What is added to the output of the module that it is a child of, before that projects it: [B, Hq, T, D]."""
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
    """Attention by what the module is bound to. query [B, Hq, T, D]; key, value [B, Hkv, S, D]; returns [B, T, Hq, D].

    `attention_mask` is bool [B, 1 or Hq, T, S], True where a query may look; None is causal.
    """
    bound: Bound = getattr(module, _BOUND)
    length, held = query.shape[2], key.shape[2]
    if scaling is None:
        scaling = float(query.shape[-1] ** -0.5)
    layer = None if bound.layers is None else bound.layers[module.layer_idx]  # type: ignore[index]
    extras = find_extras(module)
    if layer is None or not layer.at_once:
        for extra in extras:
            key, value = extra.hold(key, value)
    if bound.rotary is not None:
        query, key = _rotate(bound, bound.rotary, layer, query, key, sum(extra.positions for extra in extras))
    if layer is None:
        mask = attention_mask
    else:
        layer.remember(query, scaling)
        mask = layer.mask(kwargs.get("sliding_window"))
    fronts = list(filter(None, [extra.before(query) for extra in extras]))
    if mask is None and (fronts or length not in (1, held)):
        mask = torch.ones(length, held, dtype=torch.bool, device=query.device).tril(held - length)[None, None]
    for more_keys, more_values in fronts:
        key = torch.cat([more_keys.to(key.dtype), key], dim=2)
        value = torch.cat([more_values.to(value.dtype), value], dim=2)
        mask = nn.functional.pad(mask, (more_keys.shape[2], 0), value=True)  # type: ignore[arg-type]
    added = [part for extra in extras if (part := extra.beside(query, module)) is not None]
    weights: Tensor | None = None
    observers, readers = bound.plan.chain("attend_observe"), bound.plan.chain("attend_scores")
    if observers or readers:
        out, weights, scores = _attend_openly(query, key, value, mask, scaling)
        if layer is not None and layer.observing:
            layer.observe(weights[..., -held:].unflatten(1, (key.shape[1], -1)))
        for observe in observers:
            observe(module, weights)
        for read in readers:
            read(module, scores)
        if dropout and module.training:
            weights = nn.functional.dropout(weights, dropout)
            out = weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    elif layer is not None and layer.observing:
        tell = layer.observe
        out = _attend_in_parts(query, key, value, mask, scaling, lambda part, _: tell(part[..., -held:]))
    else:
        out = _attend_fused(query, key, value, mask, dropout, scaling)
    return sum(added, out).transpose(1, 2).contiguous(), weights


def _rotate(
    bound: Bound, rotary: Unrotated, layer: Layer | None, query: Tensor, key: Tensor, front: int
) -> tuple[Tensor, Tensor]:
    """Unrotated queries and keys rotated to where they stand, behind so many positions in `front` of the tokens."""
    if layer is None:
        if key.shape[2] != query.shape[2]:
            raise Unsupported("keys that are held before they are rotated need a cache of slots, see `adopt`")
        stood = asked = rotary.positions[:, None]
    else:
        stood, asked = layer.ranks()
        if bound.plan.slot("rope") is None:
            stood, asked = stood + front, asked + front
    repeats = 1 if asked.shape[1] == 1 else query.shape[1] // asked.shape[1]
    query = rotate(rotary.rotary, query, asked.repeat_interleave(repeats, 1))
    return query, rotate(rotary.rotary, key, stood)


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float
) -> Tensor:
    """torch's own attention, which keeps no weights."""
    groups = query.shape[1] // key.shape[1]
    fused = nn.functional.scaled_dot_product_attention
    if query.shape[2] == 1 and groups > 1 and (mask is None or mask.shape[1] in (1, key.shape[1])):
        # Heads that share keys stand as rows of one query: beside a mask, torch would copy the keys for each of them.
        rows = query.reshape(len(query), key.shape[1], groups, -1)
        wide = None if mask is None else mask.expand(-1, -1, groups, -1)
        return fused(rows, key, value, wide, dropout, scale=scaling).reshape(query.shape[:3] + value.shape[3:])
    if mask is not None and mask.shape[1] not in (1, query.shape[1]):
        mask = mask.repeat_interleave(groups, 1)
    causal = mask is None and query.shape[2] > 1
    return fused(query, key, value, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=groups > 1)


def _attend_openly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs [B, Hq, T, D], all weights and their scores [B, Hq, T, S]; -inf where a query does not look."""
    parts: list[Tensor] = []
    out = _attend_in_parts(query, key, value, mask, scaling, lambda *told: parts.extend(told), query.shape[2])
    return out, parts[0].flatten(1, 2), parts[1].flatten(1, 2)


def _attend_in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    tell: Callable[[Tensor, Tensor], None],
    size: int = QUERIES,
) -> Tensor:
    """Outputs [B, Hq, T, D], and the weights and scores [B, Hkv, G, t, S] of some queries after others to `tell`."""
    heads, length = key.shape[1], query.shape[2]
    if mask is None:
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - length)[None, None]
    # [B, Hkv, G, T, S]; a mask of one head, or one for each head of queries
    mask = mask.unflatten(1, (heads, -1)) if mask.shape[1] == query.shape[1] else mask[:, :, None]
    outs = []
    for queries, seen in zip(query.unflatten(1, (heads, -1)).split(size, 3), mask.split(size, 3), strict=True):
        # Heads that share keys stand as rows of queries: torch would copy keys and values for each of them.
        shape = queries.shape[2:4]
        scores = (queries.flatten(2, 3) @ key.transpose(2, 3) * scaling).unflatten(2, shape)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~seen, float("-inf"))
        # A query that sees nothing (padding) gets zeros, as in the fused kernel.
        weights = scores.softmax(-1).nan_to_num().to(query.dtype)
        tell(weights, scores)
        outs.append((weights.flatten(2, 3) @ value).unflatten(2, shape))
    return torch.cat(outs, 3).flatten(1, 2)


def _no_mask(*_: Any, **__: Any) -> None:
    """The mask where a cache says what queries see."""


AttentionInterface.register(NAME, attend)
AttentionInterface.register(SLOTS, attend)
# Without a mask function of the same name transformers passes no mask and padding would be looked at.
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionMaskInterface.register(SLOTS, _no_mask)


def find_extras(attention: nn.Module) -> list[AttentionExtra]:
    """What takes part in the attention of a module now."""
    return [child for child in attention.children() if isinstance(child, AttentionExtra) and child.active]


def find_holder(model: nn.Module) -> AttentionExtra | None:
    """What says how keys and values of a model are held, as in its first attention module."""
    return next((extra for first in list_attention(model)[:1] for extra in find_extras(first) if extra.holds), None)


@dataclasses.dataclass(frozen=True)
class OwnEncoder:
    """Stands in the slot `encoder` for a model that says itself how its keys and values are held."""

    holder: AttentionExtra
    is_identity = True  # a plan with nothing else changes nothing of the model

    def codecs(self) -> tuple[Codec | None, Codec | None]:
        """Those of the model."""
        return self.holder.codecs()

    def __str__(self) -> str:
        return f"the {type(self.holder).__name__} in the model's attention"


def adopt(plan: InferPlan, model: nn.Module) -> InferPlan:
    """The plan, whose caches hold keys and values as the model says, if it says so."""
    holder = find_holder(model)
    if holder is not None:
        encoder: Any = OwnEncoder(holder)
        plan.claim("encoder", encoder, encoder)
    return plan


def is_carried(plan: InferPlan, model: nn.Module) -> bool:
    """Whether a plan holds nothing, or nothing but what `adopt` would make of the model."""
    slots = [name for name in plan.slots if plan.slot(name) is not None]
    own = not slots or (slots == ["encoder"] and find_holder(model) is not None)
    return own and not any(plan.chain(name) for name in plan.chains)


def list_attention(model: nn.Module) -> list[nn.Module]:
    """The attention modules of all blocks that have one, inside of what stands round them."""
    view = Blocks(model)
    found = [getattr(block, view.names.attention, None) for block in view.blocks]
    return [find_inner(module) for module in found if module is not None]


def count_prefix(model: nn.Module) -> int:
    """Positions that stand before the first token, in the attention of every block."""
    return sum(extra.positions for first in list_attention(model)[:1] for extra in find_extras(first))


def changes_attention(model: nn.Module, plan: InferPlan) -> bool:
    """Whether attention is not the model's own without a cache that settles, which it keeps otherwise."""
    openly = plan.chain("attend_observe") or plan.chain("attend_scores")
    return bool(openly) or any(map(find_extras, list_attention(model)))


@contextlib.contextmanager
def own_attention(model: Any, plan: InferPlan, cache: Any = None) -> Iterator[None]:
    """Route the model's attention through `attend` where anything changes it, and restore it.

    `cache` is what the model is about to be given; one of `slot_layers` says itself what queries see.
    """
    layers = getattr(cache, "slot_layers", None)
    if layers is None and not changes_attention(model, plan):
        yield
        return
    modules = list_attention(model)
    before = [vars(module).get(_BOUND) for module in modules]
    with contextlib.ExitStack() as stack:
        turning = layers is not None and plan.slot("rope") is not None
        turning = turning or (find_holder(model) is not None and has_rotary(model))
        bound = Bound(plan, layers, stack.enter_context(unrotated(model)) if turning else None)
        for module in modules:
            setattr(module, _BOUND, bound)
        try:
            stack.enter_context(route_attention(model, NAME if layers is None else SLOTS))
            yield
        finally:
            for module, outer in zip(modules, before, strict=True):
                setattr(module, _BOUND, outer)


def attending(model: Any) -> AbstractContextManager[None]:
    """Have what was trained in the model's attention take part in it, if it does not already under some plan."""
    if model.config._attn_implementation in (NAME, SLOTS):
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
