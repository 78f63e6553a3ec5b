"""Uniform grids: where they lie for given weights, their codes, and the packed linear that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from effbench.formats.integer import IntLinear
from effbench.formats.nm import NMIntLinear, pattern_of

GridName = Literal["gptq", "awq"]
WIDTHS = (2, 3, 4, 8)  # bits per weight that can be packed
HALF_MIN, HALF_MAX = 2.0**-24, 65504.0  # smallest positive and largest float16


class Packable(Protocol):
    """What a packed linear takes over of the one that stood there."""

    @property
    def bias(self) -> Tensor | None:
        """[out]"""

    @property
    def kept(self) -> Tensor | None:
        """Bool [out, in], False where a weight must stay zero."""


class Grid(NamedTuple):
    """A uniform grid, weight = scale * (code - zero); `scale` and `zero` broadcast against the weights."""

    scale: Tensor  # float32
    zero: Tensor  # float32, whole numbers in [0, 2^bits - 1]: zero is always on the grid
    bits: int

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes of `weight`, float32 whole numbers in [0, 2^bits - 1]; ties go to the even multiple."""
        return (weight / self.scale).round_().add_(self.zero).clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The weights that `codes` stand for."""
        return (codes - self.zero).mul_(self.scale)

    def round(self, weight: Tensor) -> Tensor:
        """`weight` moved to the nearest grid points."""
        return self.decode(self.codes(weight))

    def per_group(self) -> Grid:
        """Scale and zero without the last dimension that `fit_grid` leaves."""
        return self._replace(scale=self.scale.squeeze(-1), zero=self.zero.squeeze(-1))

    @staticmethod
    def join(grids: Sequence[Grid]) -> Grid:
        """One grid of the groups of several, each [out, groups]."""
        scale, zero = (torch.cat(column, 1) for column in zip(*((g.scale, g.zero) for g in grids), strict=True))
        return Grid(scale, zero, grids[0].bits)

    def as_stored(self) -> Grid:
        """The same grid with its scales as they are stored, in float16."""
        return self._replace(scale=self.scale.half().float().clamp(HALF_MIN, HALF_MAX))


def fit_grid(weight: Tensor, bits: int, symmetric: bool = False, grid: GridName = "gptq", mse: bool = False) -> Grid:
    """The grid of every row of `weight` [..., n]; its scale and zero are [..., 1].

    Two grids are published under one name. `gptq` widens the range to include 0, and its symmetric scale is
    2 max|w| / (2^bits - 1). `awq` takes the range as it is and clamps the zero, and its symmetric scale is
    max|w| / (2^(bits-1) - 1). `mse` shrinks each `gptq` range by up to 80 % where that lowers the sum of |error|^2.4.
    Sources: IST-DASLab/gptq `Quantizer`, mit-han-lab/llm-awq `pseudo_quantize_tensor`.
    """
    top = 2**bits - 1
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if grid == "awq":
        if symmetric:
            scale = torch.maximum(-low, high).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
            return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)), bits)
        scale = (high - low).clamp(min=1e-5) / top
        return Grid(scale, (-(low / scale).round()).clamp(0, top), bits)

    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = low == high  # all weights are zero: any scale will do
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    best_grid = _grid_of_range(low, high, bits, symmetric)
    if not mse:
        return best_grid
    best = torch.full_like(low, torch.inf)
    for step in range(80):
        shrink = 1 - step / 100
        candidate = _grid_of_range(shrink * low, shrink * high, bits, symmetric)
        error = (candidate.round(weight) - weight).abs_().pow_(2.4).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_grid = Grid(
            torch.where(better, candidate.scale, best_grid.scale),
            torch.where(better, candidate.zero, best_grid.zero),
            bits,
        )
    return best_grid


def _grid_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    scale = (high - low) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round()
    return Grid(scale, zero, bits)


def split_groups(weight: Tensor, group_size: int) -> list[Tensor]:
    """`weight` [out, in] as [out, groups, group_size], groups along the input, and what is left as [out, 1, rest]."""
    number = weight.shape[1] // group_size
    whole, rest = weight.tensor_split([number * group_size], 1)
    return [part for part in (whole.unflatten(1, (number, group_size)), rest.unsqueeze(1)) if part.numel()]


def round_linear(
    layer: Packable, weight: Tensor, sharing: Sequence[Tensor], grids: Sequence[Grid], symmetric: bool, size: int | None
) -> nn.Module:
    """Pack `weight` [out, in], every number at the nearest point.

    `sharing` are its parts in order, each [rows, groups, n] with the grid of its groups; `size` inputs a group.
    """
    codes = [grid.codes(part).flatten(1) for grid, part in zip(grids, sharing, strict=True)]
    # A pruned weight is exactly 0, and 0 is on every grid: its code is the zero-point.
    joined = Grid.join([grid.per_group() for grid in grids])
    return int_linear(layer, torch.cat(codes, 1).view(weight.shape), joined, symmetric, size)


def int_linear(
    layer: Packable,
    codes: Tensor,
    grid: Grid,
    symmetric: bool,
    group_size: int | None = None,
    g_idx: Tensor | None = None,
    keep: Tensor | None = None,
) -> nn.Module:
    """Pack `codes` [out, in]; the grid's scale and zero are [out or 1, groups], of `group_size` inputs each.

    `g_idx` [in] names each input's group where they are not consecutive.
    Codes of pruned weights (`keep`, by default `layer.kept`, is False) must be the zero-point. In an n:m pattern
    only the others are stored.
    """
    zero = None if symmetric else grid.zero
    keep = layer.kept if keep is None else keep
    pattern = pattern_of(keep)
    if keep is not None and pattern is not None:
        return NMIntLinear.of(
            codes,
            grid.scale,
            zero,
            g_idx,
            bits=grid.bits,
            keep=keep,
            pattern=pattern,
            group_size=group_size,
            bias=layer.bias,
        )
    return IntLinear.of(
        codes, grid.scale, zero, g_idx, bits=grid.bits, group_size=group_size, bias=layer.bias, keep=keep
    )
