"""Decoding by captured CUDA graphs over a cache of fixed size.

Launching a step's hundreds of kernels from Python takes longer than running them at small batches. A graph replays them
with one launch, at the same addresses: the tokens to be fed and the keys and values stay where they are, and how many
tokens the cache holds is a tensor on the device, which transformers' static layers count up themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, StaticLayer

from effbench.core.errors import Unsupported, first_line
from effbench.machine.capture import CAPTURES, Step
from effbench.nn.infer.engine import Engine, State
from effbench.nn.model import attention
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.feed import count_soft

NAME = "effbench-static"


ALIGNED = 16  # fused attention wants rows of the mask aligned


class Decoder(Protocol):
    """What feeds prompts and then decodes greedily: an `Engine`, or a `StaticDecoder`."""

    def prefill(self, ids: Tensor) -> State:
        """Feed prompts [B, T]; the state's `ids` are the most likely next tokens."""

    def decode(self, state: State) -> State:
        """Feed one token per sequence."""


class StaticDecoder:
    """Decodes prompts of the shape [B, T] of `ids`, up to `new` tokens each, one captured step at a time.

    The tokens are those of the engine's `decode`. There is one state: its `ids` are overwritten by every step.
    """

    @torch.inference_mode()
    def __init__(self, engine: Engine, ids: Tensor, new: int, capture: Callable[[Step, torch.device], Step]) -> None:
        self._engine = engine
        self._room = ids.shape[1] + new
        self._front = count_soft(engine.model)  # slots before the first token
        size = -(-(self._front + self._room) // ALIGNED) * ALIGNED
        # Layers of full length for every block: masks, not layers, would cut a window.
        self._layers: list[Any] = [StaticLayer(max_cache_len=size) for _ in range(len(Blocks(engine.model)))]
        self._cache = Cache(layers=[*self._layers])
        self._places = torch.arange(size, device=engine.device)[None, None, None]
        self._ids = ids[:, -1].to(engine.device, copy=True)
        self.prefill(ids)  # allocates the layers
        self._cache.reset()  # the steps before and in capture have to stay within the cache
        self._replay = capture(self._step, engine.device)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> State:
        """Feed prompts [B, T] into the emptied cache."""
        self._cache.reset()
        out = self._engine.forward(ids.to(self._engine.device), self._cache)
        self._ids.copy_(out.logits[:, -1].argmax(-1))
        return State(self._cache, self._ids, ids.shape[1])

    def decode(self, state: State) -> State:
        """Feed one token per sequence. Raises `ValueError` when the cache is full."""
        if state.length >= self._room:  # on the device it would be a write out of bounds
            raise ValueError(f"the static cache holds {self._room} tokens and is full")
        self._replay()
        return State(self._cache, self._ids, state.length + 1)

    @torch.inference_mode()
    def rewind(self, length: int) -> State:
        """Forget all but the first `length` tokens of those held; the token generated last is fed next."""
        for layer in self._layers:
            layer.cumulative_length.fill_(self._front + length)
        return State(self._cache, self._ids, length)

    @torch.inference_mode()
    def _step(self) -> None:
        # A copy: the first layer counts itself up before the others have read their position.
        position = self._layers[0].cumulative_length.clone().view(1, 1)
        mask = torch.zeros_like(self._places, dtype=self._layers[0].keys.dtype)
        mask = mask.masked_fill(self._places > position, float("-inf"))
        with attention.route_attention(self._engine.model, NAME):
            out = self._engine.model(
                self._ids[:, None],
                past_key_values=self._cache,
                use_cache=True,
                position_ids=position.expand(len(self._ids), 1),
                attention_mask=mask,  # of four dimensions: models pass it on as it is
                logits_to_keep=1,
            )
        self._ids.copy_(out.logits[:, -1].argmax(-1))


def attend_grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token. query [B, Hq, 1, D]; key, value [B, Hkv, S, D]; mask [1, 1, 1, S], added to scores.

    Returns [B, 1, Hq, D]. Heads that share keys stand as rows of one query: beside a mask, torch would copy the whole
    cache for each of them.
    """
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, key.shape[1], -1, width)
    mask = attention_mask.expand(*rows.shape[:3], -1)
    out = nn.functional.scaled_dot_product_attention(rows, key, value, mask, scale=scaling)
    return out.reshape(batch, 1, heads, -1), None


AttentionInterface.register(NAME, attend_grouped)


def decoders(engines: Sequence[Engine], ids: Tensor, new: int) -> tuple[list[Decoder], str]:
    """Decoders of `new` tokens after prompts of the shape of `ids`, alike for all engines, and what they are."""
    reason = next((obstacle for engine in engines if (obstacle := _find_obstacle(engine, ids.shape[1] + new))), None)
    if reason is None:
        try:
            capture = CAPTURES[engines[0].device.type]
            return [StaticDecoder(engine, ids, new, capture) for engine in engines], "cuda graph over a static cache"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, Unsupported) as error:
            reason = f"not captured: {first_line(error)}"
    return list(engines), f"eager ({reason})"


def _find_obstacle(engine: Engine, room: int) -> str | None:
    """Why this engine cannot decode over a static cache of `room` tokens."""
    if engine.device.type not in CAPTURES:
        return f"no graphs on {engine.device.type}"
    if engine.plan.streams:
        return "the cache evicts or encodes"
    if attention.changes_attention(engine.model, engine.plan):
        return "attention is changed"
    window = getattr(engine.model.config, "sliding_window", None)
    if window is not None and window < room:
        return f"attention slides over {window} tokens"
    return None
