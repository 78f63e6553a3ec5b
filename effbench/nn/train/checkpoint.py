"""The state of a fit in a folder, from which a killed one goes on to the same bits.

Trees of dictionaries, lists, tensors and plain values: tensors lie in a file of safetensors, the rest as JSON that
names them. A state lies in `STEP/RANK`, a part for each process, which appears whole or not at all: of tensors in parts
what the process holds. What a fit goes on from is the last step of which all parts are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from effbench.nn.model.held import local

TENSORS, REST = "tensors.safetensors", "state.json"


def count_ranks() -> tuple[int, int]:
    """The number of this process among those that train one model together, and how many they are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def agree(wish: bool, device: torch.device) -> bool:
    """Whether any of the processes wishes it; all of them have to ask."""
    if count_ranks()[1] == 1:
        return wish
    wishes = torch.tensor([float(wish)], device=device)
    distributed.all_reduce(wishes)
    return bool(wishes)


def write_state(folder: Path, step: int, state: dict[str, Any], device: torch.device) -> None:
    """Put the state after so many steps into a folder, in the place of earlier ones.

    All processes call it together. Raises `TypeError` for what cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    rest = _take_out(state, "", tensors)
    rank, _ = count_ranks()
    part = folder / str(step) / str(rank)
    new = part.with_suffix(".new")
    for left in (new, part):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(tensors, new / TENSORS)
    (new / REST).write_text(json.dumps(rest))
    for name in (TENSORS, REST):
        _sync(new / name)
    new.rename(part)
    agree(True, device)  # all parts are there
    for other in list_steps(folder):
        if other != step:
            shutil.rmtree(folder / str(other) / str(rank), ignore_errors=True)
            with contextlib.suppress(OSError):  # other processes have parts in it
                (folder / str(other)).rmdir()


def read_state(folder: Path) -> dict[str, Any] | None:
    """This process's part of the last state of which all parts are there; None if there is none."""
    rank, ranks = count_ranks()
    for step in sorted(list_steps(folder), reverse=True):
        parts = [folder / str(step) / str(number) for number in range(ranks)]
        if all((part / REST).is_file() for part in parts):
            tensors = load_file(parts[rank] / TENSORS)
            state: dict[str, Any] = _put_in(json.loads((parts[rank] / REST).read_text()), tensors)
            return state
    return None


def list_steps(folder: Path) -> list[int]:
    """The steps of which there is a state, or the beginning of one."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]


def _take_out(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = local(value).detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[key, _take_out(inner, f"{name}/{key}", tensors)] for key, inner in value.items()]
        return {"dict": pairs}  # as pairs: keys may be numbers
    if isinstance(value, (list, tuple)):
        items = [_take_out(inner, f"{name}/{place}", tensors) for place, inner in enumerate(value)]
        return {type(value).__name__: items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}: a state between steps holds tensors, numbers and text")


def _put_in(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "tensor":
        return tensors[items]
    if kind == "dict":
        return {key: _put_in(inner, tensors) for key, inner in items}
    return (tuple if kind == "tuple" else list)(_put_in(inner, tensors) for inner in items)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
