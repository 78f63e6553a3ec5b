"""Fewer heads of keys and values, each made of a contiguous group of trained ones: what GQA and MQA share."""

from __future__ import annotations

import functools
import zlib
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.grouped import regroup, require_regroupable, settle_groups
from effbench.nn.model.structure import find_cuttable, heads

if TYPE_CHECKING:
    from effbench.core.method import Method
    from effbench.core.run import Run

Pool = Literal["mean", "first", "random"]
SHARE = 4  # of the heads that there are one is left, where no number is given


def pool_heads(run: Run, method: Method, kv_heads: int | None, pool: Pool) -> None:
    """Leave every block `kv_heads` heads of keys and values, by default a quarter of its own.

    Raises `Unsupported` where they cannot be had from groups of one size; then nothing has changed.
    """
    view = Blocks(run.model)
    chosen = find_cuttable(run, view, view.names.qkv[-2:])
    wanted = {index: _count(view, index, kv_heads) for index in chosen}
    wanted = {index: number for index, number in wanted.items() if number < heads(view, index).groups}
    for index in wanted:
        require_regroupable(view, index)
    pooled = {}
    for index, number in wanted.items():
        path = view.path(index, view.names.attention)
        pooled[path] = [heads(view, index).groups, number]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{run.seed}/{path}".encode()))
        regroup(view, index, functools.partial(_pool, number=number, pool=pool, generator=generator))
    settle_groups(view)
    if pooled:
        run.log.removed.append({"step": str(method), "pooled_heads": pooled})


def _count(view: Blocks, index: int, kv_heads: int | None) -> int:
    """Heads of keys and values that block `index` is to have. Raises `Unsupported`."""
    there = heads(view, index).groups
    path = view.path(index, view.names.attention)
    if kv_heads is None:
        if there == 1:
            raise Unsupported(f"{path}: has one head of keys and values already")
        # Where a quarter is no whole number, or leaves a rest, the next smaller number that divides them; at least 1.
        return next(number for number in range(max(1, there // SHARE), 0, -1) if there % number == 0)
    if kv_heads > there or there % kv_heads:
        fitting = [number for number in range(1, there + 1) if there % number == 0]
        raise Unsupported(f"{path}: {there} heads of keys make no {kv_heads} groups of one size; kv_heads={fitting} do")
    return kv_heads


def _pool(trained: Tensor, number: int, pool: Pool, generator: torch.Generator) -> Tensor:
    """Heads [number, D, in] for trained ones [heads, D, in] (section 2.1 of the paper of GQA, and its figure 4)."""
    groups = trained.unflatten(0, (number, -1))  # contiguous, as heads of queries share them
    if pool == "mean":
        return groups.mean(1)
    if pool == "first":
        return groups[:, 0]
    drawn = torch.randn(groups[:, 0].shape, generator=generator).to(trained)
    return drawn * trained.std()
