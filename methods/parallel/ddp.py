"""Distributed data parallel: every process reads its share of a step, and gradients are summed (Li et al., 2020)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from effbench.core.run import Run
from effbench.methods.parallel._ranks import Replicas
from effbench.nn.train.shards import check_alike


@dataclass(frozen=True)
class DDP(Replicas):
    """Each process holds the whole model; gradients are reduced in one flat bucket, after the backward pass.

    The loss is a mean over the learned tokens of all ranks, so that it does not matter how many there are.
    """

    paper = "arXiv:2006.15704"
    caveats = (
        "one bucket, reduced after the backward pass; the paper overlaps buckets with it",
        "not torch's DistributedDataParallel, which waits for a backward pass of every rank: one whose examples have "
        "no learned token has none, and gradients are sums over the learned tokens of all ranks, not means over ranks",
    )
    type = "parallel training"
    weight_update = "training"
    claims = ("train.parallel",)
    trials = ({"ranks": 1},)

    @contextlib.contextmanager
    def wrap(self, run: Run) -> Iterator[Any]:
        yield
        if self.ranks > 1:  # sums come out alike on all ranks
            check_alike(run.model)
