"""GPTQ: round column by column, every error compensated by the columns that follow (Frantar et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effbench.core.kinds import Weights
from effbench.core.views import Layer
from effbench.formats.compensation import compensate, inverse_factor, neutralize_dead
from effbench.formats.grid import WIDTHS, Grid, fit_grid, int_linear


def solve(
    weight: Tensor,
    factor: Tensor,
    grid_of: Callable[[int, Tensor], Grid],
    block: int = 128,
    kept: Tensor | None = None,
) -> Tensor:
    """Codes [out, in] (uint8) of `weight` [out, in]: Algorithm 1, whose loop is `compensate`.

    `grid_of(column, rest)` gives the grid of a column, its scale and zero [out]; `rest` [in, out] are the weights as
    compensated up to the current block. Weights where `kept` [out, in] is False are rounded to zero, and that error
    is compensated like any other.
    """
    codes = torch.empty(weight.shape[::-1], dtype=torch.uint8, device=weight.device)
    pruned = None if kept is None else ~kept.T

    def settle(column: int, ahead: Tensor, rest: Tensor) -> Tensor:
        grid = grid_of(column, rest)
        code = grid.codes(ahead[0])  # Q_:j = quant(W_:j) of Algorithm 1, of all rows at once
        if pruned is not None:
            code = torch.where(pruned[column], grid.zero, code)
        codes[column] = code
        return grid.decode(code)

    compensate(weight, factor, settle, block)
    return codes.T


@dataclass(frozen=True)
class GPTQ(Weights):
    """The authors' loop, with their options. `group_size=None` gives one grid per row.

    Groups lie along the input; the last one is shorter where they do not divide the width. Dynamic groups take their
    grid when the loop reaches them, from weights that carry the compensation of all finished *blocks* but not of the
    current one: the authors read the outer matrix, and so does this. Static groups take their grid from the original
    weights.
    """

    paper = "arXiv:2210.17323"
    published = "gptq()"
    type = "PTQ"
    weight_update = "Hessian-based compensation"
    needs = {"hessian"}
    trials = (
        {},
        {"bits": 3, "act_order": True},
        {"bits": 2, "group_size": None},
        {"static_groups": True, "act_order": True, "symmetric": True},
        {"true_sequential": True, "mse": True},
    )

    bits: int = 4  # 2, 3, 4 or 8
    group_size: int | None = 128  # consecutive inputs that share a scale; the last may be fewer
    symmetric: bool = False  # zero in the middle of the codes instead of a zero-point of its own
    act_order: bool = False  # columns in the order of falling Hessian diagonal
    static_groups: bool = False  # fix the grids of all groups before the first column is rounded
    true_sequential: bool = False  # recalibrate between q/k/v, o, gate/up and down
    mse: bool = False  # shrink ranges where that lowers the error
    damp: float = 0.01  # of the mean Hessian diagonal, added to every diagonal entry
    block: int = 128  # columns between two updates of the whole matrix; does not change the result

    def check(self) -> None:
        self.require(self.bits in WIDTHS, f"bits must be one of {WIDTHS}")
        self.require(self.group_size is None or self.group_size > 0, "group_size must be positive, or None")
        self.require(self.group_size is not None or not self.static_groups, "static_groups needs a group_size")
        self.require(self.damp > 0, "damp must be positive")
        self.require(self.block > 0, "block must be positive")

    @property
    def true_sequence(self) -> bool:
        return self.true_sequential

    def compress(self, layer: Layer) -> nn.Module:
        weight, hessian, kept = layer.weight, layer.inputs.hessian, layer.kept
        size = self.group_size or weight.shape[1]
        dynamic = self.group_size is not None and not self.static_groups
        # Step 1, grids that are known beforehand. The authors take a grid per row before they clear dead inputs, grids
        # per group after it.
        grids = [self._grid(weight)] if self.group_size is None else []
        weight, hessian = neutralize_dead(weight, hessian)
        if self.static_groups:
            grids = [self._grid(part) for part in weight.split(size, 1)]

        # Step 2, the order of the columns: as they lie, or by falling diagonal of H ("act-order").
        order = place = torch.arange(len(hessian), device=weight.device)
        if self.act_order:
            order = hessian.diagonal().argsort(descending=True, stable=True)  # before damping
            weight, hessian = weight[:, order], hessian[order][:, order]
            kept = None if kept is None else kept[:, order]
        group = (place if dynamic else order) // size  # of each column in the order of the loop
        member = group.tolist()

        def grid_of(column: int, rest: Tensor) -> Grid:
            if member[column] == len(grids):  # a dynamic group begins
                grids.append(self._grid(rest[column : column + size].T))
            return grids[member[column]]

        # Step 3, Algorithm 1: the loop over the columns with U from H = 2 X X^T, dampened.
        codes = solve(weight, inverse_factor(hessian, self.damp, layer.name), grid_of, self.block, kept)
        scale, zero = (torch.stack(column, 1) for column in zip(*((g.scale, g.zero) for g in grids), strict=True))
        # Step 4, codes back in the order of the inputs; dynamic groups lie in the order of the loop and are named.
        back = order.argsort()
        g_idx = group[back] if dynamic and self.act_order else None
        return int_linear(layer, codes[:, back], Grid(scale, zero, self.bits), self.symmetric, self.group_size, g_idx)

    def _grid(self, weight: Tensor) -> Grid:
        """The stored grid of every row of `weight` [out, n]; scale and zero [out]."""
        return fit_grid(weight, self.bits, self.symmetric, mse=self.mse).as_stored().per_group()
