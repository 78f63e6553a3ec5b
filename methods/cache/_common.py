"""How cached keys and values are rounded: groups along channels or along tokens, packed in few bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from effbench import ops
from effbench.core.errors import Unsupported
from effbench.core.views import Codec

Bits = Literal[16, 8, 4, 2, "fp8"]
FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of E4M3


def round_channels(bits: Bits, group: int | None, retain: int) -> Codec | None:
    """A codec of single tokens, whose channels have a scale for each `group`, or one for all; None for 16 bits."""
    if bits == 16:
        return None

    def encode(units: Tensor) -> tuple[Tensor, ...]:
        width = units.shape[-1]
        if width % (group or width):
            raise Unsupported(f"heads of {width} channels cannot be rounded in groups of {group}")
        return round_groups(units.unflatten(-1, (-1, group or width)), bits)

    def decode(stored: tuple[Tensor, ...], width: int) -> Tensor:
        return restore(stored, bits, group or width).flatten(-2)

    return Codec(encode, decode, retain=retain)


def round_tokens(bits: Bits, group: int, flush: int, retain: int, whole: bool = False) -> Codec | None:
    """A codec of `group` tokens, with a scale for each of their channels, or for the `whole`; None for 16 bits."""
    if bits == 16:
        return None

    def encode(units: Tensor) -> tuple[Tensor, ...]:
        turned = units.transpose(-1, -2)  # [N, K, D, unit]
        return round_groups(turned.flatten(-2)[..., None, :] if whole else turned, bits)

    def decode(stored: tuple[Tensor, ...], width: int) -> Tensor:
        turned = restore(stored, bits, group * width if whole else group)
        return (turned.flatten(-2).unflatten(-1, (width, group)) if whole else turned).transpose(-1, -2)

    return Codec(encode, decode, group, flush, retain)


def round_groups(groups: Tensor, bits: Bits) -> tuple[Tensor, ...]:
    """Numbers [..., L] in few bits, with what decodes them."""
    if bits != "fp8":
        return tuple(ops.load("kv_quantize")(groups, int(bits)))
    scale = groups.abs().amax(-1, keepdim=True) / LARGEST
    return (groups / scale).nan_to_num(0.0).clamp(-LARGEST, LARGEST).to(FP8), scale


def restore(stored: tuple[Tensor, ...], bits: Bits, size: int) -> Tensor:
    """[..., size] of what `round_groups` stored."""
    if bits == "fp8":
        return stored[0].to(stored[1].dtype) * stored[1]
    found: Tensor = ops.load("kv_dequantize")(*stored, int(bits), size)
    return found
