"""Tensors of which each process holds a part: what it holds, in how many bytes, and the whole again.

Parts are `DTensor`s of torch, as `fully_shard` and `parallelize_module` put them in the place of parameters. Everything
here takes whole tensors as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import _composable_state
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from effbench.core.errors import Diverged
from effbench.nn.model.held import local

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts, one of them here."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; all of them ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    full: Tensor = tensor.full_tensor().detach()
    return full


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, divided as `like` is; without communication."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def join_states(optimizer: Any) -> None:
    """Have states of parameters in parts be parts of the same kind: loaded ones are what this process holds of them."""
    for parameter, states in optimizer.state.items():
        if isinstance(parameter, DTensor):
            held, mesh, places = local(parameter), parameter.device_mesh, parameter.placements
            size, stride = parameter.shape, parameter.stride()
            for name, value in states.items():
                if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.shape == held.shape:
                    states[name] = DTensor.from_local(value, mesh, places, run_check=False, shape=size, stride=stride)


def settle_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Have gradients of tensors in parts be parts of the same kind: some come out whole, or as summands."""
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
            parameter.grad = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def sum_plain(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients of those that every process holds whole, over all processes, by one collective.

    A process may lack a gradient (no learned token): it counts as zero, and what no process has stays without.
    """
    held = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not held:
        return
    there = torch.tensor([float(p.grad is not None) for p in held], device=held[0].device)
    distributed.all_reduce(there)
    used = [parameter for parameter, number in zip(held, there.tolist(), strict=True) if number]
    if not used:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
    distributed.all_reduce(flat)
    for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def find_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all gradients, float64 []: replicated ones count once, those in parts are summed over them."""
    squares: dict[Any, Tensor] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        key: Any = None
        if isinstance(gradient, DTensor):
            split = tuple(not isinstance(place, Replicate) for place in gradient.placements)
            key = (gradient.device_mesh, split) if any(split) else None
        square = torch.linalg.vector_norm(local(gradient), dtype=torch.float64).square()
        squares[key] = squares[key] + square if key in squares else square
    for key, square in squares.items():
        if key is not None:
            mesh, split = key
            for dimension, is_split in enumerate(split):
                if is_split:
                    distributed.all_reduce(square, group=mesh.get_group(dimension))
    return sum(squares.values(), start=torch.zeros((), dtype=torch.float64, device=parameters[0].device)).sqrt()


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], most: float) -> None:
    """Shorten gradients to a norm of at most `most`, as `torch.nn.utils.clip_grad_norm_` does for whole ones."""
    factor = (most / (find_norm(parameters) + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            held = local(parameter.grad)
            held.mul_(factor.to(held.dtype))


@contextlib.contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Have parameters replaced by parts inside, and the same parameters, whole, in every process after.

    Classes and hooks of modules are put back, too. Parameters give up their memory once `release` says so.
    """
    modules = list(model.modules())
    places = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
    classes = [(module, type(module)) for module in modules]
    hooks = [(module, {name: vars(module)[name].copy() for name in HOOKS}) for module in modules]

    def gather() -> None:
        there: set[int] = set()
        for module, name, before in places:
            now = module._parameters.get(name)
            if isinstance(now, DTensor) and id(before) not in there:
                before.data = whole(now)
                there.add(id(before))

    try:
        try:
            yield
        except Diverged:  # on all of them
            gather()
            raise
        gather()
    finally:
        for module, name, before in places:
            if isinstance(module._parameters.get(name), DTensor):
                module._parameters[name] = before
        for module, cls in classes:
            module.__class__ = cls
            _composable_state._module_state_mapping.pop(module, None)
            for key in (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params"):
                vars(module).pop(key, None)
        for module, kept in hooks:
            for name, entries in kept.items():
                registered = vars(module)[name]
                registered.clear()
                registered.update(entries)


def release(parameters: Iterable[nn.Parameter], model: nn.Module) -> None:
    """Free the memory of parameters that the model holds in parts by now."""
    still = set(model.parameters())
    for parameter in parameters:
        if parameter not in still:
            parameter.data = parameter.data.new_empty(0)
            parameter.grad = None


def check_alike(model: nn.Module) -> None:
    """Raise `RuntimeError` where processes hold different parameters: from there on they would train other models."""
    digest = torch.stack([torch.hash_tensor(p.detach()).view(torch.int64) for p in model.parameters()])
    low, high = digest.clone(), digest.clone()
    distributed.all_reduce(low, distributed.ReduceOp.MIN)
    distributed.all_reduce(high, distributed.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RuntimeError("the ranks hold different parameters after the fit")
