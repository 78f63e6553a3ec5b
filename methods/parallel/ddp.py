"""Distributed data parallel: every process reads its share of a step, and gradients are summed (Li et al., 2020)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.nn.train.slots import Parallel


@dataclass(frozen=True)
class DDP(Train, Parallel):
    """Each process holds the whole model; gradients are reduced in one flat bucket, after the backward pass.

    The loss is a mean over the learned tokens of all ranks, so that it does not matter how many there are.
    """

    paper = "arXiv:2006.15704"
    caveats = ("one bucket, reduced after the backward pass; the paper overlaps buckets with it",)
    type = "parallel training"
    weight_update = "training"
    claims = ("train.parallel",)
    trials = ({"ranks": 1},)

    ranks: int = 2  # processes

    def check(self) -> None:
        self.require(self.ranks > 0, "ranks must be at least 1")

    def apply(self, run: Run) -> None:
        world = distributed.get_world_size() if distributed.is_initialized() else 1
        if world != self.ranks:
            raise Unsupported(f"{self.ranks} ranks are wanted, and {world} are there")
        super().apply(run)

    @property
    def data_ranks(self) -> int:
        return self.ranks

    @property
    def data_rank(self) -> int:
        return distributed.get_rank() if self.ranks > 1 else 0

    @contextlib.contextmanager
    def wrap(self, run: Run) -> Iterator[Any]:
        yield
        # Sums come out alike on all ranks; were they not, the ranks would train different models from here on.
        digest = torch.stack([torch.hash_tensor(p.detach()).view(torch.int64) for p in run.model.parameters()])
        low, high = digest.clone(), digest.clone()
        if self.ranks > 1:
            distributed.all_reduce(low, distributed.ReduceOp.MIN)
            distributed.all_reduce(high, distributed.ReduceOp.MAX)
        if not torch.equal(low, high):
            raise RuntimeError("the ranks hold different parameters after the fit")

    def shard(self, places: Sequence[int]) -> list[int]:
        return list(places)[self.data_rank :: self.ranks]

    def total(self, values: Tensor) -> Tensor:
        if self.ranks > 1:
            distributed.all_reduce(values)
        return values

    def merge(self, terms: dict[str, float]) -> dict[str, float]:
        if self.ranks == 1:
            return terms
        parts: list[dict[str, float]] = [{} for _ in range(self.ranks)]
        distributed.all_gather_object(parts, terms)
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in names}

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.ranks == 1:
            return
        # A rank without a learned token has no gradients at all, and what no rank has computed stays without.
        there = self.total(torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device))
        used = [p for p, number in zip(parameters, there.tolist(), strict=True) if number]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
        distributed.all_reduce(flat)
        for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def agree(self, finite: bool) -> bool:
        return not self.merge({"overflowed": float(not finite)})["overflowed"]

    def largest(self, values: Tensor) -> Tensor:
        if self.ranks > 1:
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
        return values
