"""What a fit trains: groups of the optimizer, each tensor in one, and tensors too narrow to be trained as they are."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from effbench.core.errors import Refused, Unsupported
from effbench.nn.model.blocks import Blocks

if TYPE_CHECKING:
    from effbench.core.run import GroupReport, Run

Groups = list[dict[str, Any]]


def group_parameters(run: Run, lr: float, weight_decay: float) -> Groups:
    """Everything trainable in groups of the optimizer, as the plan's methods arrange it; no group is empty.

    Raises `Unsupported` where nothing is trainable, `Refused` where a method leaves a tensor out or names it twice.
    """
    names = {parameter: name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    if not names:
        raise Unsupported("fit has nothing to train: every parameter is frozen or packed, or outside of its train=")
    still = find_undecayed(run.model)
    defaults = {"lr": lr, "weight_decay": weight_decay}
    groups: Groups = [
        defaults | {"params": [parameter for parameter in names if parameter not in still]},
        defaults | {"params": [parameter for parameter in names if parameter in still], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    for method in run.train.chain("param_groups"):
        arranged = [defaults | group | {"params": _list(group["params"])} for group in method.param_groups(groups, run)]
        groups = [group for group in arranged if group["params"]]
        times = Counter(parameter for group in groups for parameter in group["params"])
        wrong = [f"leaves out {name}" for parameter, name in names.items() if not times[parameter]]
        wrong += [f"names {names.get(parameter, 'a tensor')} twice" for parameter, n in times.items() if n > 1]
        wrong += ["names a tensor that is not trainable" for parameter in times if not parameter.requires_grad]
        if wrong:
            more = f", and {len(wrong) - 1} more like it" if len(wrong) > 1 else ""
            raise Refused(f"{method}: param_groups {wrong[0]}{more}; every trainable tensor belongs in one group")
    return groups


def find_undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that weight decay leaves alone: vectors (norms, biases, magnitudes, gates), tables of embeddings, and
    those that their module names in an attribute `undecayed`."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        named = getattr(module, "undecayed", ())
        for name, parameter in module.named_parameters(recurse=False):
            vector = sum(size > 1 for size in parameter.shape) < 2
            if vector or isinstance(module, nn.Embedding) or name in named:
                found.add(parameter)
    return found


@contextlib.contextmanager
def limit_to(model: nn.Module, part: str) -> Iterator[None]:
    """Have nothing trained inside but what lies in a part of the model, `all` or `last:N` blocks.

    Raises `Unsupported` for more blocks than there are.
    """
    inside = set(model.parameters())
    if part != "all":
        view, number = Blocks(model), int(part.removeprefix("last:"))
        if number > len(view):
            raise Unsupported(f"train={part!r}: the model has {len(view)} blocks")
        inside = {parameter for block in view.blocks[-number:] for parameter in block.parameters()}
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in inside]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def widen(parameters: Iterable[nn.Parameter]) -> Iterator[bool]:
    """Have `parameters` in float32 inside and round them after; says whether there were narrower ones."""
    narrow = [(p, p.dtype) for p in parameters if p.is_floating_point() and p.dtype.itemsize < 4]
    for parameter, _ in narrow:
        parameter.data = parameter.data.float()
    try:
        yield bool(narrow)
    finally:
        for parameter, dtype in narrow:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def describe_group(group: dict[str, Any]) -> GroupReport:
    """A group for the record."""
    return {
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
        "tensors": len(group["params"]),
        "parameters": sum(parameter.numel() for parameter in group["params"]),
    }


def _list(params: Any) -> list[nn.Parameter]:
    """What an optimizer takes for the tensors of a group, as a list."""
    return [params] if isinstance(params, nn.Parameter) else list(params)
