"""The one way of giving tokens to a model, for fits, teachers and probes alike: soft prompts go in front here.

A soft prompt belongs to the model that was trained with it. It stands before the tokens of every row, takes positions,
and nothing predicts it: logits and labels are those of the tokens alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effbench.core.run import InferPlan
from effbench.nn.model.attention import attending, count_prefix, own_attention
from effbench.nn.model.linear import Added

SOFT = "soft_prompt"  # name of the module in the model
INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


class SoftPrompt(Added):
    """Embeddings [length, width] that stand in front of those of the tokens; a child of the model."""

    undecayed = ("rows",)

    def __init__(self, length: int, width: int, adapter: str = "") -> None:
        super().__init__()
        self.length, self.width, self.adapter = length, width, adapter
        self.rows = nn.Parameter(torch.zeros(length, width, dtype=torch.float32))

    def config(self) -> dict[str, Any]:
        """Arguments of `__init__`, for saving."""
        return {"length": self.length, "width": self.width, "adapter": self.adapter}


def find_soft(model: nn.Module) -> list[SoftPrompt]:
    """The soft prompts that count now."""
    return [child for child in model.children() if isinstance(child, SoftPrompt) and child.active]


def count_soft(model: nn.Module) -> int:
    """Embeddings that stand in front of the tokens."""
    return sum(soft.length for soft in find_soft(model))


def count_front(model: nn.Module) -> int:
    """Positions before the first token: of a soft prompt, or of prefixes in attention."""
    return count_soft(model) + count_prefix(model)


def feed(
    model: Any,
    batch: dict[str, Tensor],
    cache: Any = None,
    body: bool = False,
    plan: InferPlan | None = None,
    **options: Any,
) -> Any:
    """What the model gives for `input_ids` [B, T] of a batch, as transformers returns it; with `body` without its head.

    `inputs_embeds` [B, T, H] may stand in the place of ids.
    `attention_mask` is [B, T], 1 where a token is real, or bool [B, 1, T, T], and `position_ids` [B, T] if that is so.
    With a cache the tokens extend what it holds, and a mask [B, T] is of all its tokens and the new ones. Attention
    goes by `plan`; by default as it goes already.
    """
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    soft, seen = count_soft(model), 0 if cache is None else int(cache.get_seq_length())
    if count_front(model):
        inputs = _place(model, inputs, seen)
        if soft and not seen:
            inputs = _put_in_front(model, torch.cat([prompt.rows for prompt in find_soft(model)]), inputs)
    caching = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    with attending(model) if plan is None else own_attention(model, plan, cache):
        out = (model.base_model if body else model)(**inputs, **caching, **options)
    if soft and not seen and "logits_to_keep" not in options:
        name = "last_hidden_state" if body else "logits"
        out[name] = out[name][:, soft:]
    return out


def _place(model: Any, inputs: dict[str, Tensor], seen: int) -> dict[str, Tensor]:
    """Inputs whose tokens have positions behind all that stands in front; `seen` counts a soft prompt in the cache."""
    ids, front = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"], count_front(model)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if positions is None and mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if positions is None:
        before = max(0, seen - count_soft(model))
        positions = torch.arange(before, before + ids.shape[1], device=ids.device).expand(len(ids), -1)
    inputs = inputs | {"position_ids": positions + front}
    if seen and mask is not None:  # of the tokens alone; the cache holds the soft prompt, too
        inputs["attention_mask"] = nn.functional.pad(mask, (count_soft(model), 0), value=1)
    return inputs


def _put_in_front(model: Any, rows: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs that begin with embeddings [L, H] in every row; packed examples of a row all see the ones in front."""
    given = inputs.get("inputs_embeds")
    tokens = model.get_input_embeddings()(inputs["input_ids"]) if given is None else given
    length = len(rows)
    front = rows.to(tokens.dtype).expand(len(tokens), -1, -1)
    first = torch.arange(length, device=tokens.device).expand(len(tokens), -1) + count_prefix(model)
    fed = {
        "inputs_embeds": torch.cat([front, tokens], 1),
        "position_ids": torch.cat([first, inputs["position_ids"]], 1),
    }
    mask = inputs.get("attention_mask")
    if mask is None:
        return fed
    if mask.ndim == 2:
        return fed | {"attention_mask": nn.functional.pad(mask, (length, 0), value=1)}
    grown = nn.functional.pad(mask, (length, 0, length, 0), value=True)
    grown[:, :, :length] = torch.ones_like(grown[:, :, :length]).tril()
    return fed | {"attention_mask": grown}
