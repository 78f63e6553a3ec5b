"""Expert parallel: experts are divided over processes, tokens go to where theirs lie and come back (GShard, 2021)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.methods.parallel._ranks import Replicas
from effbench.nn.model.experts import TENSORS, compute_expert, list_experts
from effbench.nn.train.shards import is_part
from effbench.nn.train.slots import Shares, find_shares


@dataclass(frozen=True)
class EP(Replicas):
    """Of E experts a block, each of N ranks holds E/N with their gradients and states, and a copy of all else.

    Every rank reads its share of the examples. In each mixture tokens are dispatched to the ranks of their experts by
    one all-to-all, computed there, and combined by a second one where they came from (section 3.2 of the paper).
    """

    paper = "arXiv:2006.16668"
    caveats = (
        "the model's own router and loss: no capacity of experts, so that no token is dropped, and no auxiliary loss, "
        "which the paper adds; what it computes is what one process computes",
        "published for models trained from scratch, of 600 billion parameters on 2048 TPUs",
    )
    type = "parallel training"
    weight_update = "training"
    claims = ("train.parallel",)
    trials = ({"ranks": 1},)

    @property
    def lockstep(self) -> bool:
        return self.ranks > 1

    @contextlib.contextmanager
    def wrap(self, run: Run) -> Iterator[Any]:
        with self.holding_parts(run):
            yield

    def check_whole(self, run: Run) -> None:
        experts = list_experts(run.model)
        if not experts:
            raise Unsupported(f"{self}: a {run.model.config.model_type} has no experts to divide; give ddp() or fsdp()")
        for module in experts:
            if module.num_experts % self.ranks:
                raise Unsupported(f"{self}: {module.num_experts} experts cannot be divided by {self.ranks} ranks")
        super().check_whole(run)

    @contextlib.contextmanager
    def divide(self, run: Run) -> Iterator[None]:
        mesh = init_device_mesh(run.device.type, (self.ranks,))
        modules = list_experts(run.model)
        for experts in modules:
            for name in TENSORS:
                old = experts.get_parameter(name)
                part = distribute_tensor(old.detach(), mesh, [Shard(0)], src_data_rank=None)
                setattr(experts, name, nn.Parameter(part, old.requires_grad))
            experts.forward = functools.partial(compute_apart, experts)
        try:
            yield
        finally:
            for experts in modules:
                del experts.forward

    def deal(self, plain: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Groups of whole tensors and of parts: what takes many tensors in one call does not take both."""
        groups = plain.param_groups
        plain.param_groups = []
        for group in groups:
            for part in (False, True):
                chosen = [parameter for parameter in group["params"] if is_part(parameter) is part]
                plain.param_groups += [group | {"params": chosen}] if chosen else []
        return plain

    def shares(self, model: nn.Module) -> Shares:
        experts = {parameter for module in list_experts(model) for parameter in module.parameters()}
        return find_shares(model, lambda p: 1 / self.ranks if p in experts else 1.0)


def compute_apart(experts: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What a mixture makes of states [N, H] of this rank, sent to experts `chosen` [N, k] that count by `weights`."""
    ranks = distributed.get_world_size()
    order = chosen.flatten().argsort(stable=True)  # copies of tokens by expert, and so by rank
    token = order // chosen.shape[1]
    counts = chosen.flatten().bincount(minlength=experts.num_experts)
    given = all_to_all_single(counts, None, None, get_world())  # by rank, and then by the experts of this one
    sent, received = (number.view(ranks, -1).sum(1).tolist() for number in (counts, given))

    dispatched = exchange(states[token], received, sent)
    place = torch.arange(len(given), device=given.device) % (len(given) // ranks)
    by_expert = place.repeat_interleave(given).argsort(stable=True)
    sizes = given.view(ranks, -1).sum(0).tolist()
    gate_up, down = (getattr(experts, name).to_local(grad_placements=[Shard(0)]) for name in TENSORS)
    rows = dispatched[by_expert].split(sizes)
    computed = torch.cat([compute_expert(experts, part, gate_up[i], down[i]) for i, part in enumerate(rows)])
    back = exchange(computed[by_expert.argsort()], sent, received)

    combined = torch.zeros_like(states)
    return combined.index_add(0, token, (back * weights.flatten()[order, None]).to(states.dtype))


def exchange(rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
    """Rows [S, H] dealt out to all ranks, so many to each, for those that they send; gradients take the way back."""
    found: Tensor = all_to_all_single_autograd(rows.contiguous(), received, sent, get_world())
    return found.wait() if hasattr(found, "wait") else found


def get_world() -> distributed.ProcessGroup:
    """The group of all ranks."""
    world = distributed.group.WORLD
    assert world is not None
    return world
