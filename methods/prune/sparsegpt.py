"""SparseGPT: prune column by column, every error compensated by the columns that follow (Frantar & Alistarh, 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effbench.core.kinds import Weights
from effbench.core.views import Layer
from effbench.formats.compensation import compensate, inverse_factor, neutralize_dead
from effbench.formats.grid import WIDTHS, Grid, fit_grid, int_linear
from effbench.formats.sparse import Pattern
from effbench.methods.prune._common import check_pattern, prune


def solve(
    weight: Tensor,
    factor: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    kept: Tensor | None = None,
    grid: Grid | None = None,
) -> tuple[Tensor, Tensor]:
    """The pruned and compensated `weight` [out, in] and its mask: Algorithm 1, whose loop is `compensate`.

    `factor` [in, in] is U as `compensate` takes it. The weights of lowest cost w^2 / [H^-1]_cc go, where H is the
    Hessian of the columns from c on, so that [H^-1]_cc = U_cc^2. Unstructured, one threshold holds for all rows of a
    block of columns, and at least one weight of it goes, as in the authors' code; with `pattern` (n, m) each row keeps
    n of every m columns when the loop reaches them. Weights where `kept` [out, in] is False go first. With `grid`
    (scale and zero [out]) what is kept is rounded to it in the same pass.
    """
    rows = weight.T.shape
    keep = torch.ones(rows, dtype=torch.bool, device=weight.device)
    final = torch.empty(rows, device=weight.device)
    inverse_diagonal = factor.diagonal().square().unsqueeze(1)

    def choose(column: int, ahead: Tensor) -> None:
        # Adaptive mask selection: masks are chosen when the loop reaches a block of columns (the paper's B_s: `block`,
        # or m), from weights that carry the compensation of all columns before it.
        if pattern is None and (column % block or not sparsity):
            return
        if pattern is not None and column % pattern[1]:
            return
        ahead = ahead if pattern is None else ahead[: pattern[1]]
        span = slice(column, column + len(ahead))
        cost = ahead.square() / inverse_diagonal[span]  # w_c^2 / U_cc^2, [columns, out]
        if kept is not None:
            cost *= kept.T[span]
        if pattern is None:
            number = int(cost.numel() * sparsity)  # over all rows together
            keep[span] = cost > cost.flatten().kthvalue(number + 1).values
        else:
            # m - n of every m columns, row by row
            gone = cost.topk(pattern[1] - pattern[0], 0, largest=False).indices
            keep[span] = torch.ones_like(cost, dtype=torch.bool).scatter_(0, gone, False)

    def settle(column: int, ahead: Tensor, rest: Tensor) -> Tensor:
        choose(column, ahead)
        if kept is not None:
            keep[column] &= kept.T[column]
        # A pruned weight's error, which `compensate` spreads, is all of it; a kept one's is that of rounding (zero
        # without a grid).
        value = ahead[0] if grid is None else grid.round(ahead[0])
        return torch.mul(value, keep[column], out=final[column])

    compensate(weight, factor, settle, block)
    return final.T, keep.T


@dataclass(frozen=True)
class SparseGPT(Weights):
    """The authors' loop, with n:m patterns and with joint quantization: `bits` rounds what is kept in the same pass,
    to one grid per row taken from the dense weights."""

    paper = "arXiv:2301.00774"
    published = "sparsegpt()"
    type = "post-training"
    sparsifies = True
    weight_update = "Hessian-based compensation"
    needs = {"hessian"}
    trials = ({}, {"pattern": "2:4", "bits": 4})

    sparsity: float = 0.5  # fraction of the weights set to zero; n:m fixes it at 1 - n/m
    pattern: str = "unstructured"  # or n:m (keep n of every m inputs of a row), such as "2:4"
    damp: float = 0.01  # of the mean Hessian diagonal, added to every diagonal entry
    block: int = 128  # columns that share a threshold, and columns between two updates of the whole matrix
    bits: int | None = None  # 2, 3, 4 or 8: quantize jointly
    symmetric: bool = False  # grid of the joint quantization

    def check(self) -> None:
        check_pattern(self, self.sparsity, self.pattern)
        kind, _, m = Pattern.of(self.pattern)
        self.require(kind != "block", "SparseGPT prunes weights one by one; pattern must be 'unstructured' or n:m")
        self.require(self.block > 0, "block must be positive")
        self.require(
            kind != "n:m" or self.block % m == 0, f"block must be a multiple of {m} for pattern {self.pattern}"
        )
        self.require(self.damp > 0, "damp must be positive")
        self.require(self.bits is None or self.bits in WIDTHS, f"bits must be one of {WIDTHS}, or None")

    def check_shape(self, out: int, width: int) -> None:
        Pattern.of(self.pattern).check_shape(out, width)

    def compress(self, layer: Layer) -> nn.Module:
        kind, n, m = Pattern.of(self.pattern)
        # Joint quantization: the grid of every row is known beforehand.
        grid = None
        if self.bits is not None:
            grid = fit_grid(layer.weight, self.bits, self.symmetric).as_stored().per_group()
        # Algorithm 1, with U from the dampened Hessian.
        weight, hessian = neutralize_dead(layer.weight, layer.inputs.hessian)
        factor = inverse_factor(hessian, self.damp, layer.name)
        pattern = (n, m) if kind == "n:m" else None
        final, keep = solve(weight, factor, self.sparsity, pattern, self.block, layer.kept, grid)
        if grid is None:
            return prune(layer, keep, self.pattern, final)
        whole = Grid(grid.scale.unsqueeze(1), grid.zero.unsqueeze(1), grid.bits)
        return int_linear(layer, whole.codes(final), whole, self.symmetric, keep=keep)
