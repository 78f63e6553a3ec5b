"""ZeRO: states, gradients and parameters of the optimizer in parts, one a process (Rajbhandari et al., 2020)."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.methods.parallel._ranks import Replicas
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.feed import find_soft
from effbench.nn.train.shards import check_alike
from effbench.nn.train.slots import Shares


@dataclass(frozen=True)
class FSDP(Replicas):
    """Of 4 bytes of weights, 4 of gradients and 8 of AdamW's states a parameter in float32, a rank of N holds
    8 + 8/N (stage 1), 4 + 12/N (stage 2) or 16/N (stage 3).

    Stage 1 is torch's ZeroRedundancyOptimizer, which deals out whole tensors; stages 2 and 3 are its `fully_shard`,
    which keeps parts of each tensor: it gathers a block's weights when they are needed, and at stage 2 they stay until
    the backward pass is through with them. Codes of packed linears are no parameters: every rank has all of them.
    """

    paper = "arXiv:1910.02054"
    caveats = (
        "stage 2 of torch's engine keeps whole weights from the forward to the end of the backward pass, and parts of "
        "them between steps; the paper's keeps them whole throughout",
        "gradients of stage 1 are all-reduced in one bucket after the backward pass; the paper reduce-scatters them",
    )
    type = "parallel training"
    weight_update = "training"
    claims = ("train.parallel",)
    trials = ({"ranks": 1}, {"ranks": 1, "stage": 1})

    stage: Literal[1, 2, 3] = 3  # of ZeRO: what lies in parts, from states alone to everything

    @property
    def lockstep(self) -> bool:
        return self.stage > 1 and self.ranks > 1

    @contextlib.contextmanager
    def wrap(self, run: Run) -> Iterator[Any]:
        if self.stage > 1:
            with self.holding_parts(run):
                yield
            return
        yield
        if self.ranks > 1:
            check_alike(run.model)

    def check_whole(self, run: Run) -> None:
        super().check_whole(run)
        if find_soft(run.model):
            raise Unsupported(
                f"{self}: a soft prompt reads the table of embeddings before it is gathered: give stage=1"
            )

    @contextlib.contextmanager
    def divide(self, run: Run) -> Iterator[None]:
        mesh = init_device_mesh(run.device.type, (self.ranks,))
        blocks = list(Blocks(run.model).blocks)
        times = Counter(parameter for block in blocks for parameter in set(block.parameters()))
        # Numbers by themselves cannot be divided, and what blocks share has no one block to be gathered for.
        kept = {p for p in run.model.parameters() if not p.ndim or times[p] > 1}
        options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": self.stage == 3, "ignored_params": kept}
        for module in [*blocks, run.model]:
            fully_shard(module, **options)
        parts = [module for module in run.model.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_gradient_divide_factor(1.0)  # the loss is a share of the mean over all ranks already
            part.set_force_sum_reduction_for_comms(True)
            part.set_reduce_scatter_unused_params(True, recurse=False)
        # A pass without gradients ends here for stage 2, too: what is read between steps are parts.
        run.model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else _reshard(parts))
        yield
        _reshard(parts)

    def deal(self, plain: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.stage > 1 or self.ranks == 1:
            return plain
        if not type(plain).__module__.startswith("torch.optim"):
            raise Unsupported(f"{self}: ZeroRedundancyOptimizer builds optimizers of torch, not {type(plain).__name__}")
        return Dealt(plain)

    @property
    def period(self) -> int:
        return self.ranks if self.stage == 1 else 1

    def fullest(self, optimizer: Any) -> set[int]:
        if not isinstance(optimizer, Dealt):
            return {0}
        parts = optimizer._partition_parameters()  # type: ignore[attr-defined]
        numbers = [sum(parameter.numel() for group in part for parameter in group["params"]) for part in parts]
        return {0, numbers.index(max(numbers))}  # the first has most examples

    def shares(self, model: nn.Module) -> Shares:
        states, gradients, parameters = (self.ranks if self.stage >= stage else 1 for stage in (1, 2, 3))
        return Shares(parameters, gradients, states)


class Dealt(ZeroRedundancyOptimizer):
    """An optimizer whose tensors are dealt out to ranks, the largest first; each saves what it holds."""

    def __init__(self, plain: torch.optim.Optimizer) -> None:
        known = inspect.signature(type(plain)).parameters
        defaults = {name: value for name, value in plain.defaults.items() if name in known}
        super().__init__(plain.param_groups, type(plain), **defaults)
        self.state = self.optim.state

    def state_dict(self) -> dict[str, Any]:
        """Of this rank's own tensors."""
        state: dict[str, Any] = self.optim.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of this rank's own tensors."""
        self.optim.load_state_dict(state)
        self.state = self.optim.state
        self._sync_param_groups(self.optim.param_groups, self.param_groups)  # type: ignore[attr-defined]


def _reshard(parts: Sequence[FSDPModule]) -> None:
    for part in parts:
        part.reshard()
