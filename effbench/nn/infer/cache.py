"""Key-value caches that keep fewer tokens or fewer bits, as layers of transformers' own cache.

A slot is a cached token of one key-value head: its position, whether it is real (not padding) and the attention
mass it has received. After every forward pass `settle` lets the plan's methods evict (keep) and then encode.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from effbench.core.run import InferPlan
from effbench.core.views import Slots


class SlotLayer(CacheLayerMixin):
    """One layer's cache. Between forward passes an encoder's form of keys and values is all that is held."""

    is_croppable = True

    def __init__(self, index: int, plan: InferPlan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.plan = plan
        self.slots: Slots | None = None
        self.padding: Tensor | None = None  # bool [B, T] of the tokens to come, True where real
        self._stored: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens [B, Hkv, T, D]; return all keys and values held."""
        batch, heads, length, _ = key_states.shape
        device = key_states.device
        seen = self.get_seq_length()
        position = torch.arange(seen, seen + length, device=device).expand(batch, heads, length)
        valid = torch.ones(batch, length, dtype=torch.bool, device=device) if self.padding is None else self.padding
        fresh = Slots(
            self.index,
            key_states,
            value_states,
            position,
            valid[:, None].expand(batch, heads, length),
            torch.zeros(batch, heads, length, device=device),
            seen + length,
            self.slots is None,
        )
        self.padding = None
        if self.slots is not None:
            old = self._decode()
            both: dict[str, Any] = {
                name: torch.cat([getattr(old, name), getattr(fresh, name)], 2)
                for name in ("keys", "values", "position", "valid", "mass")
            }
            fresh = dataclasses.replace(fresh, **both)
        self.slots = fresh
        self.is_initialized = True
        return fresh.keys, fresh.values

    def observe(self, weights: Tensor) -> None:
        """Add the attention [B, Hq, T, S] that slots received, summed over queries and the head's group."""
        assert self.slots is not None
        batch, heads, length = self.slots.mass.shape
        self.slots.mass += weights[..., -length:].float().sum(2).view(batch, heads, -1, length).sum(2)

    def settle(self) -> None:
        """After a forward pass: evict, then encode."""
        assert self.slots is not None
        for method in self.plan.chain("cache_keep"):
            self.slots = self.slots.gather(method.keep(self.slots))
        encoder = self.plan.slot("encoder")
        if encoder is not None:
            self._stored = encoder.encode(self.slots.keys, self.slots.values)
            empty = self.slots.keys[:, :, :0]
            self.slots = dataclasses.replace(self.slots, keys=empty, values=empty)

    def _decode(self) -> Slots:
        assert self.slots is not None
        if self._stored is None:
            return self.slots
        keys, values = self.plan.slot("encoder").decode(self._stored)
        self._stored = None
        return dataclasses.replace(self.slots, keys=keys, values=values)

    @property
    def held(self) -> int:
        """Slots held per head."""
        return 0 if self.slots is None else self.slots.position.shape[2]

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values as they are held between forward passes."""
        if self.slots is None:
            return 0
        tensors = _tensors(self._stored) if self._stored is not None else [self.slots.keys, self.slots.values]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number), as after rejected drafts."""
        if self.slots is None or tokens_to_remove == 0:
            return
        slots = self._decode()
        last = slots.seen - abs(tokens_to_remove)
        stay = slots.position[0, 0] < last
        index = stay.nonzero().flatten().expand(*slots.position.shape[:2], -1)
        self.slots = dataclasses.replace(slots.gather(index), seen=last)

    def get_seq_length(self) -> int:
        """Tokens seen, held or not: the next token's position."""
        return 0 if self.slots is None else self.slots.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys: evicted tokens shift the rest, so that new tokens line up."""
        return self.held + query_length, self.get_seq_length() - self.held

    def get_max_length(self) -> int:
        return -1


def _tensors(stored: Any) -> list[Tensor]:
    if isinstance(stored, Tensor):
        return [stored]
    if isinstance(stored, dict):
        stored = list(stored.values())
    if isinstance(stored, (list, tuple)):
        return [tensor for item in stored for tensor in _tensors(item)]
    return []


class SlotCache(Cache):
    """A cache of `SlotLayer`s."""

    def __init__(self, layers: int, plan: InferPlan) -> None:
        self.slot_layers = [SlotLayer(index, plan) for index in range(layers)]
        super().__init__(layers=[*self.slot_layers])

    def expect(self, padding: Tensor | None) -> None:
        """Say which of the next tokens [B, T] are real."""
        for layer in self.slot_layers:
            layer.padding = padding

    def settle(self) -> None:
        """Evict and encode in every layer."""
        for layer in self.slot_layers:
            layer.settle()

    @property
    def shrunk(self) -> bool:
        """Whether any layer holds fewer slots than it has seen."""
        return any(layer.held < layer.get_seq_length() for layer in self.slot_layers)

    @property
    def held_bytes(self) -> int:
        """Bytes of keys and values held between forward passes."""
        return sum(layer.held_bytes for layer in self.slot_layers)

    def mask(self, module: nn.Module, mask: Tensor) -> Tensor:
        """Chain `attend_mask`: True where a slot is no padding, [B, Hkv or Hq, 1, S]."""
        slots = self.slot_layers[module.layer_idx].slots  # type: ignore[index]
        assert slots is not None
        # Of the module, not of the configuration: heads may have been pruned layer by layer.
        return slots.valid.repeat_interleave(getattr(module, "num_key_value_groups", 1), 1).unsqueeze(2)

    def observe(self, module: nn.Module, weights: Tensor) -> None:
        """Chain `attend_observe`: mass of the slots."""
        self.slot_layers[module.layer_idx].observe(weights)  # type: ignore[index]
