"""What engines share: processes of one fit, and those of them that see different examples."""

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
from effbench.nn.train.groups import widen
from effbench.nn.train.shards import check_alike, clip, put_back, release, sum_plain
from effbench.nn.train.slots import Parallel


@dataclass(frozen=True)
class Ranks(Train, Parallel):
    """Processes that hold one model together. One rank is as no engine."""

    ranks: int = 2  # processes

    def check(self) -> None:
        self.require(self.ranks > 0, "ranks must be at least 1")

    def apply(self, run: Run) -> None:
        world = distributed.get_world_size() if distributed.is_initialized() else 1
        if world != self.ranks:
            raise Unsupported(f"{self.ranks} ranks are wanted, and {world} are there")
        super().apply(run)

    @property
    def rank(self) -> int:
        """The number of this process."""
        return distributed.get_rank() if self.ranks > 1 else 0

    @property
    def device(self) -> str:
        """Where collectives take numbers from."""
        return "cuda" if distributed.get_backend() == "nccl" else "cpu"

    def agree(self, finite: bool) -> bool:
        return finite if self.ranks == 1 else not self.largest(torch.tensor([float(not finite)], device=self.device))

    def largest(self, values: Tensor) -> Tensor:
        if self.ranks > 1:
            distributed.all_reduce(values, distributed.ReduceOp.MAX)
        return values

    def flops_per_token(self, flops: float, tokens: int) -> float:
        """Those of all ranks over the tokens that they read, each once."""
        if self.ranks > 1:
            both = torch.tensor([flops, tokens], dtype=torch.float64, device=self.device)
            distributed.all_reduce(both)
            flops, read = both.tolist()
            tokens = round(read * self.data_ranks / self.ranks)
        return super().flops_per_token(flops, tokens)

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> None:
        clip(parameters, most) if self.ranks > 1 else super().clip(parameters, most)

    @contextlib.contextmanager
    def holding_parts(self, run: Run) -> Iterator[None]:
        """Round the fit of an engine that divides parameters: `divide` does, and all ranks hold all of them after."""
        if self.ranks == 1:
            yield
            return
        self.check_whole(run)
        with widen(p for p in run.model.parameters() if p.requires_grad), put_back(run.model):
            parameters = list(run.model.parameters())
            with self.divide(run):
                release(parameters, run.model)
                del parameters
                yield
        check_alike(run.model)

    @contextlib.contextmanager
    def divide(self, run: Run) -> Iterator[None]:
        """Have the model in parts inside."""
        raise NotImplementedError

    def check_whole(self, run: Run) -> None:
        """Raise `Unsupported` where a method of the fit reads or steps whole tensors that lie in parts."""
        owner = run.train.owner("optimizer")
        if owner is not None:
            raise Unsupported(f"{self}: {owner} keeps states of whole matrices, and here each rank has a part of them")
        for method in run.train.chain("on_step"):
            raise Unsupported(f"{self}: {method} reads whole gradients after each step, and here they lie in parts")


@dataclass(frozen=True)
class Replicas(Ranks):
    """Each process reads its share of the examples of a step, and gradients are summed.

    The loss is a mean over the learned tokens of all ranks, so that it does not matter how many there are.
    """

    @property
    def data_ranks(self) -> int:
        return self.ranks

    @property
    def data_rank(self) -> int:
        return self.rank

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
        if self.ranks > 1:
            sum_plain(parameters)

    @contextlib.contextmanager
    def apart(self, run: Run) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.lockstep:
                for module in (run.model, run.model.base_model):
                    stack.callback(module.register_forward_pre_hook(self._refuse, prepend=True).remove)
            yield

    def _refuse(self, *_: Any) -> None:
        raise Unsupported(
            f"{self}: a method passes its own examples through the model, of which each rank holds a part: the others "
            "do not take part; give ddp()"
        )
