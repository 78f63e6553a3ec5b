"""KIVI: keys by channel, values by token, the newest as they are (Liu et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effbench.core.kinds import Cache
from effbench.core.views import Codec
from effbench.methods.cache._common import round_channels, round_tokens


@dataclass(frozen=True)
class KIVI(Cache):
    """A few channels of keys are large in all tokens, so that keys are rounded channel by channel, over `group` tokens;
    values have no such channels and are rounded token by token, over `group` channels.

    Keys wait until there are `residual` of them and are then rounded all at once; values are rounded one by one, when
    they are `residual` tokens old (section 3.3 of the paper). The prompt is read in full precision.
    """

    paper = "arXiv:2402.02750"
    published = "kivi()"
    type = "cache quantization"
    identity = {"bits": 16}
    trials = ({"group": 8, "residual": 8}, {"bits": 4, "group": 16, "residual": 16})

    bits: Literal[16, 8, 4, 2] = 2  # of a number; 16: as computed
    group: int = 32  # G: tokens, or channels, that share a scale
    residual: int = 128  # R: newest tokens that may stay as they are, a multiple of the group

    def check(self) -> None:
        self.require(self.group >= 1, "group must be at least 1")
        self.require(self.residual >= self.group, "residual must be at least one group")
        self.require(self.residual % self.group == 0, "residual must be a multiple of the group")

    def codecs(self) -> tuple[Codec | None, Codec | None]:
        keys = round_tokens(self.bits, self.group, flush=self.residual, retain=0)
        values = round_channels(self.bits, self.group, retain=self.residual)
        return keys, values
