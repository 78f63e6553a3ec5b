"""Tensor parallel: each rank computes with some heads and some units of the MLP (Shoeybi et al., 2019)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from effbench.core.run import Run
from effbench.methods.parallel._megatron import SUMMAND, check_heads, check_linears, divide_blocks, list_divided
from effbench.methods.parallel._ranks import Ranks
from effbench.nn.model.blocks import Blocks
from effbench.nn.train.shards import settle_gradients, sum_plain
from effbench.nn.train.slots import Shares, find_shares


@dataclass(frozen=True)
class TP(Ranks):
    """Y = f(X A) B with A in columns and B in rows: one all-reduce forward and one backward for attention and MLP each.

    All ranks see the same examples. The table of embeddings and the head are divided by the vocabulary, too.
    """

    paper = "arXiv:1909.08053"
    caveats = (
        "logits are gathered before the loss; the paper computes it in parts of the vocabulary",
        "dropout of attention draws alike on all ranks: the heads of each lose the same places",
    )
    type = "parallel training"
    weight_update = "training"
    claims = ("train.parallel",)
    trials = ({"ranks": 1},)

    @contextlib.contextmanager
    def wrap(self, run: Run) -> Iterator[Any]:
        with self.holding_parts(run):
            yield

    @contextlib.contextmanager
    def divide(self, run: Run) -> Iterator[None]:
        with divide_blocks(run, init_device_mesh(run.device.type, (self.ranks,)), by_sequence=False):
            yield

    def check_whole(self, run: Run) -> None:
        super().check_whole(run)
        view = Blocks(run.model)
        check_heads(view, self.ranks)
        check_linears(run, self.ranks)

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.ranks > 1:
            settle_gradients(parameters)
            sum_plain([parameter for parameter in parameters if hasattr(parameter, SUMMAND)])

    def shares(self, model: nn.Module) -> Shares:
        parts = list_divided(model) if self.ranks > 1 else set()
        return find_shares(model, lambda p: 1 / self.ranks if p in parts else 1.0)
