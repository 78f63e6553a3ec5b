"""RTN: round every weight to the nearest point of a uniform grid (Jacob et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from effbench.core.kinds import Weights
from effbench.core.views import Layer
from effbench.formats.grid import WIDTHS, GridName, fit_grid, round_linear, split_groups


@dataclass(frozen=True)
class RTN(Weights):
    """Needs no data. The baseline that every calibrated quantizer has to beat."""

    paper = "arXiv:1712.05877"
    caveats = ("weights alone, the baseline of later papers; Jacob et al. also round activations and train",)
    type = "PTQ"
    weight_update = "none"
    trials = (
        {},
        {"bits": 2},
        {"bits": 3},
        {"bits": 8},
        {"granularity": "tensor", "bits": 8},
        {"granularity": "channel", "symmetric": True},
        {"grid": "awq"},
    )

    bits: int = 4  # 2, 3, 4 or 8
    granularity: Literal["tensor", "channel", "group"] = "group"  # what shares a scale; channel: an output
    group_size: int = 128  # consecutive inputs that share a scale (granularity="group"); the last may be fewer
    symmetric: bool = False  # zero in the middle of the codes instead of a zero-point of its own
    grid: GridName = "gptq"  # the published grid, see `fit_grid`
    mse: bool = False  # shrink ranges where that lowers the error (grid="gptq")

    def check(self) -> None:
        self.require(self.bits in WIDTHS, f"bits must be one of {WIDTHS}")
        self.require(self.group_size > 0, "group_size must be positive")
        self.require(not self.mse or self.grid == "gptq", "mse=True needs grid='gptq'")

    def compress(self, layer: Layer) -> nn.Module:
        weight = layer.weight
        size = self.group_size if self.granularity == "group" else None
        if size is not None:
            sharing = split_groups(weight, size)
        else:
            sharing = [weight.unsqueeze(1) if self.granularity == "channel" else weight.reshape(1, 1, -1)]
        grids = [fit_grid(part, self.bits, self.symmetric, self.grid, self.mse).as_stored() for part in sharing]
        return round_linear(layer, weight, sharing, grids, self.symmetric, size)
