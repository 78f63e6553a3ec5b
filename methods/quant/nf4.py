"""NF4: 16 levels at normal quantiles, each block scaled by its largest weight (Dettmers et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effbench.core.kinds import Weights
from effbench.core.views import Layer
from effbench.formats.codebook import LutLinear, nearest

# As published: normal quantiles from 0.9677083 inwards, 8 above zero and 7 below, divided by the largest. They are
# written out because the last bits depend on how quantiles are computed.
LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def quantize(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes of `weight` [out, in] and the largest magnitude of every `block` weights of the flattened matrix."""
    flat = weight.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp(-1, 1)
    codes = nearest(scaled, LEVELS.to(weight.device))
    return codes.flatten()[: len(flat)].view(weight.shape), absmax


@dataclass(frozen=True)
class NF4(Weights):
    """Needs no data. `double_quant` stores the blocks' factors in 8 bits about their mean: 0.373 bit a weight less."""

    paper = "arXiv:2305.14314"
    published = "nf4()"
    type = "PTQ"
    weight_update = "none"
    trials = ({}, {"double_quant": True})

    block: int = 64  # weights of the flattened matrix that share a factor
    double_quant: bool = False  # store the factors in 8 bits

    def check(self) -> None:
        self.require(self.block > 0, "block must be positive")

    def compress(self, layer: Layer) -> nn.Module:
        # Zero is one of the levels, so pruned weights stay zero.
        codes, absmax = quantize(layer.weight, self.block)
        return LutLinear.of(
            codes,
            LEVELS.to(codes.device),
            bits=4,
            block=self.block,
            absmax=absmax,
            double_quant=self.double_quant,
            bias=layer.bias,
            keep=layer.kept,
        )
