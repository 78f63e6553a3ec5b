"""AWQ: scale salient input channels up before rounding, folding the inverse into the op before (Lin et al., 2024)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from effbench.core.kinds import Weights
from effbench.core.views import Block, Layer, SharedInput
from effbench.formats.grid import WIDTHS, Grid, fit_grid, int_linear, split_groups


@dataclass(frozen=True)
class AWQ(Weights):
    """Scale search on the output of the module that a group of linears feeds, then a clip search per group.

    `scale="paper"` is s = (mean |x|)^alpha. Variants: `"duo"` (AutoAWQ, llm-compressor) divides by the mean
    normalised |w| to the power 1 - alpha; `"seed"` is (norm of x / max |w|)^alpha.
    Blocks are calibrated on what the original blocks before them produce. Where the authors take the clipping error
    over 512 sampled tokens, it is over all calibration tokens here, through their second moments.
    """

    paper = "arXiv:2306.00978"
    published = "awq()"
    type = "PTQ"
    weight_update = "per-channel scaling and clipping"
    needs = {"norm", "hessian"}
    trials = ({}, {"bits": 3})
    sequential: ClassVar[bool] = False

    bits: int = 4  # 2, 3, 4 or 8
    group_size: int = 128  # consecutive inputs that share a scale; the last may be fewer
    symmetric: bool = False  # zero in the middle of the codes instead of a zero-point of its own
    grid: int = 20  # alphas tried: 0, 1/grid, ... (grid - 1)/grid
    clip: bool = True  # search clipping thresholds; never for q and k
    scale: Literal["paper", "duo", "seed"] = "paper"  # the formula of the channel scales

    def check(self) -> None:
        self.require(self.bits in WIDTHS, f"bits must be one of {WIDTHS}")
        self.require(self.group_size > 0, "group_size must be positive")
        self.require(self.grid > 0, "grid must be positive")

    def scales(self, block: Block, shared: Sequence[SharedInput]) -> list[Tensor | None]:
        return [self._scale(block, group, block.layers([group])) for group in shared]

    def _scale(self, block: Block, group: SharedInput, layers: Sequence[Layer]) -> Tensor | None:
        """The scale of a group's inputs [in] that changes outputs least; None where nothing before it can absorb one.

        That is s* = argmin ||Q(W diag(s)) diag(s)^-1 X - W X||, on the grid of alphas and on the module that is fed.
        """
        if group.previous is None or len(layers) < len(group.names):
            return None
        candidates = [self.candidate(layers, step / self.grid) for step in range(self.grid)]
        if layers[0].module is group.inspect:
            losses = self._losses_of_linear(layers[0], candidates)
        else:
            losses = self._losses_of_module(block, group, layers, candidates)
        return candidates[losses.index(min(losses))]

    def candidate(self, layers: Sequence[Layer], alpha: float) -> Tensor:
        """Scales [in] of linears that share an input, at one alpha: s = s_X^alpha, s_X the mean |x|, and variants."""
        inputs, weight = layers[0].inputs, torch.cat([layer.weight for layer in layers])
        if self.scale == "paper":
            scale = inputs.mean_abs.pow(alpha)
        elif self.scale == "duo":
            groups = split_groups(weight.abs(), self.group_size)
            shares = [(part / (part.amax(-1, keepdim=True) + 1e-6)).flatten(1) for part in groups]
            relative = torch.cat(shares, 1).mean(0)
            scale = inputs.mean_abs.pow(alpha) / (relative.pow(1 - alpha) + 1e-4)
        else:
            scale = (inputs.norm / weight.abs().amax(0).clamp(min=1e-4)).pow(alpha)
        scale = scale.clamp(min=1e-4)
        return scale / (scale.max() * scale.min()).sqrt()  # the authors' code: centred about 1, geometrically

    def _fit(self, groups: Tensor) -> tuple[Tensor, Grid]:
        """Codes of groups [out, groups, n], and the grid as stored.

        Codes are those of the scale before it is rounded to float16: the lowest weights of a clipped group lie halfway
        between two codes, and a scale rounded up would send all of them to the inner one.
        """
        grid = fit_grid(groups, self.bits, self.symmetric, "awq")
        return grid.codes(groups), grid.as_stored()

    def _round(self, groups: Tensor) -> Tensor:
        """Groups [out, groups, n] as they are decoded."""
        codes, grid = self._fit(groups)
        return grid.decode(codes)

    def _round_matrix(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] as it is decoded."""
        return torch.cat([self._round(part).flatten(1) for part in split_groups(weight, self.group_size)], 1)

    def _losses_of_linear(self, layer: Layer, candidates: Sequence[Tensor]) -> list[float]:
        """Mean squared change of a linear's own outputs: delta E[x x^T] delta^T, averaged over outputs."""
        moment = layer.inputs.second_moment.float()
        losses = []
        for scale in candidates:
            delta = self._round_matrix(layer.weight * scale) / scale - layer.weight
            losses.append(float(((delta @ moment) * delta).sum(dtype=torch.float64) / len(delta)))
        return losses

    def _losses_of_module(
        self, block: Block, group: SharedInput, layers: Sequence[Layer], candidates: Sequence[Tensor]
    ) -> list[float]:
        """Mean squared change of the inspected module's outputs."""
        run = block.replay(group.inspect)
        before = run()
        losses = []
        with _stand_ins(block, group, layers) as linears:
            for scale in candidates:
                for linear, layer in zip(linears, layers, strict=True):
                    linear.weight.data.copy_(self._round_matrix(layer.weight * scale) / scale)
                after = run()
                squares = (
                    (a.float() - b.float()).square().sum(dtype=torch.float64)
                    for a, b in zip(after, before, strict=True)
                )
                losses.append(float(sum(squares)) / sum(b.numel() for b in before))
        return losses

    def compress(self, layer: Layer) -> nn.Module:
        parts = split_groups(layer.weight, self.group_size)
        # Products of queries and keys make their clipping error hard to judge one linear at a time.
        if self.clip and not layer.name.rpartition(".")[2].startswith(("q_", "k_")):
            moment = layer.inputs.second_moment.float()
            widths = [part[0].numel() for part in parts]
            own = [rows.split(widths, 1)[i] for i, rows in enumerate(moment.split(widths))]
            parts = [self._clip(part, block) for part, block in zip(parts, own, strict=True)]
        codes, grids = zip(*(self._fit(part) for part in parts), strict=True)
        joined = Grid.join([grid.per_group() for grid in grids])
        return int_linear(layer, torch.cat([c.flatten(1) for c in codes], 1), joined, self.symmetric, self.group_size)

    def _clip(self, weight: Tensor, moment: Tensor) -> Tensor:
        """`weight` [out, groups, n], every group clamped where that lowers the error of its own outputs.

        Thresholds tried are max|w| times 1, 0.95, ... 0.55. `moment` [groups n, groups n] is E[x x^T] of the scaled
        inputs.
        """
        size = weight.shape[-1]
        own = torch.stack([part[:, i * size : (i + 1) * size] for i, part in enumerate(moment.split(size))])
        largest = weight.abs().amax(-1, keepdim=True)
        best, least = largest, torch.full_like(largest, torch.inf)
        for step in range(10):
            limit = largest * (1 - step / 20)
            clamped = weight.clamp(-limit, limit)
            # The change of a group's own share of the outputs: delta E[x x^T] delta^T over the group's inputs.
            delta = self._round(clamped) - weight
            through = (delta.transpose(0, 1) @ own).transpose(0, 1)  # [out, groups, n]
            error = (through * delta).sum(-1, keepdim=True)
            best, least = torch.where(error < least, limit, best), torch.minimum(error, least)
        return weight.clamp(-best, best)


@contextlib.contextmanager
def _stand_ins(block: Block, group: SharedInput, layers: Sequence[Layer]) -> Iterator[list[nn.Linear]]:
    """Plain linears in the places of a group's, to try weights in."""
    linears = []
    try:
        for name, layer in zip(group.names, layers, strict=True):
            out, width = layer.weight.shape
            like = dict(device=layer.weight.device, dtype=block.hidden[0].dtype)
            linear = nn.Linear(width, out, layer.bias is not None, **like)
            if layer.bias is not None:
                linear.bias.data.copy_(layer.bias)
            linears.append(linear)
            block.module.set_submodule(name, linear)
        yield linears
    finally:
        for name, layer in zip(group.names, layers, strict=True):
            block.module.set_submodule(name, layer.module)
