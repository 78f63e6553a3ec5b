"""KV quantization: cached keys and values in few bits, group by group (as in FlexGen; Sheng et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effbench.core.kinds import Cache
from effbench.core.views import Codec
from effbench.methods.cache._common import Bits, round_channels, round_tokens


@dataclass(frozen=True)
class KVQuant(Cache):
    """x = low + c scale, with low the least number of a group and scale its range over 2^bits - 1; fp8: x = c scale.

    Scales stand beside the codes in the type that keys are computed in, and count.
    """

    paper = "arXiv:2303.06865"
    published = "kv_quant(key_bits=4, value_bits=4, per='group', group=64)"
    type = "cache quantization"
    identity = {"key_bits": 16, "value_bits": 16}
    trials = (
        {},
        {"key_bits": 4, "value_bits": 2, "per": "group", "group": 16, "residual": 4},
        {"key_bits": 2, "value_bits": 4, "per": "channel", "group": 8},
        {"key_bits": "fp8", "value_bits": "fp8", "per": "head", "group": 8},
    )

    key_bits: Bits = 8  # of a number; 16: as computed, fp8: E4M3 with a scale
    value_bits: Bits = 8  # of a number
    per: Literal["token", "group", "channel", "head"] = "token"  # what has a scale, of each head: a token, a group of
    # its channels, a channel of some tokens, some tokens
    group: int = 32  # channels of a group, or tokens that share scales
    residual: int = 0  # newest tokens that stay as they are

    def check(self) -> None:
        self.require(self.group >= 1, "group must be at least 1")
        self.require(self.residual >= 0, "residual must be at least 0")

    def codecs(self) -> tuple[Codec | None, Codec | None]:
        keys, values = (self._codec(bits) for bits in (self.key_bits, self.value_bits))
        return keys, values

    def _codec(self, bits: Bits) -> Codec | None:
        if self.per == "token":
            return round_channels(bits, None, self.residual)
        if self.per == "group":
            return round_channels(bits, self.group, self.residual)
        return round_tokens(bits, self.group, self.group, self.residual, whole=self.per == "head")
