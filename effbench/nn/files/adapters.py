"""Files of what was trained alone: adapters by name, to be put on the model that they were trained on.

An adapter is a folder with the tensors of its modules and how to build these; of the model it holds only what it is
called and how it is quantized.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effbench.core.errors import Unsupported, Usage, first_line
from effbench.nn.files.artifact import Replacement, build_class, buildable, name_class
from effbench.nn.files.base import Base, check_base, describe_base
from effbench.nn.model.adapters import NAMED, add_part, choose_adapter, find_parts, is_name, list_adapters
from effbench.nn.model.beside import Beside
from effbench.nn.model.linear import Around, matrix_shape, replace, stored_tensors

WEIGHTS, CONFIG = "adapter.safetensors", "adapter.json"


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """What `adapter.json` holds: the modules of an adapter by path, and the model that they were trained on."""

    parts: dict[str, Replacement]
    base: Base | None = None  # None: written before it was told


def save_adapter(model: nn.Module, folder: Path, name: str) -> int:
    """Write the adapter of that name to a new folder; the bytes of its tensors.

    Raises `FileExistsError` if the folder holds anything, `Unsupported` if there is no such adapter.
    """
    parts = dict(find_parts(model, name))
    if not parts:
        raise Unsupported(f"no adapter is called {name!r}")
    try:
        described = {path: {"class": name_class(part), "config": part.config()} for path, part in parts.items()}
    except NotImplementedError:
        raise Unsupported(f"the adapter {name!r} has its final form when the run has settled, after a fit") from None
    make_folder(folder)
    tensors = {f"{path}.{own}": tensor for path, part in parts.items() for own, tensor in _own_tensors(part).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    told = {"parts": described, "base": msgspec.to_builtins(describe_base(model))}
    (folder / CONFIG).write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    return sum(tensor.nbytes for tensor in tensors.values())


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path, name: str) -> None:
    """Put the adapter of a folder on the model under a name, frozen, and choose it.

    Raises `Unsupported` where it does not fit the model or its files are not what `save_adapter` writes, `Refused`
    where it was trained on another model or on one quantized otherwise, `Usage` for a name that another has.
    """
    check_new(model, name)
    try:
        manifest = msgspec.json.decode((folder / CONFIG).read_bytes(), type=Manifest)
        tensors = load_file(folder / WEIGHTS)
    except (OSError, msgspec.DecodeError, ValueError) as error:
        raise Unsupported(f"{folder.name}: is no adapter ({first_line(error)})") from None
    check_base(model, manifest.base, folder.name)
    for path, entry in sorted(manifest.parts.items()):
        if entry.kind not in buildable():
            raise Unsupported(f"{folder.name}: {entry.kind!r} is no class of effbench's formats, models or methods")
        part = place_part(model, path, build_class(entry.kind), entry.config, name, folder)
        own = _own_tensors(part)
        found = {key.removeprefix(f"{path}."): value for key, value in tensors.items() if key.startswith(f"{path}.")}
        shapes = {key: value.shape for key, value in found.items()}
        if shapes != {key: value.shape for key, value in own.items()}:
            raise Unsupported(f"{folder.name}: the tensors of {path} are {sorted(shapes)}, expected {sorted(own)}")
        for key, value in own.items():
            value.copy_(found[key])
        for key, parameter in part.named_parameters():
            if key in own:
                parameter.requires_grad_(False)
    choose_adapter(model, name)


def check_new(model: nn.Module, name: str) -> None:
    """Raise `Usage` for what is no name of an adapter, or is that of one on the model."""
    if not name or not is_name(name):
        raise Usage(f"{name!r}: {NAMED}")
    if name in list_adapters(model):
        raise Usage(f"there is an adapter {name!r} already: give another name")


def place_part(model: nn.Module, path: str, kind: Any, config: dict[str, Any], name: str, folder: Path) -> Any:
    """A new module of the adapter `name` in its place: beside the linear at `path`, or as a child of what is there.

    `config` and `path` are of the adapter as it was called when it was saved.
    """
    path = plain_path(path)
    parent, _, child = path.rpartition(".")
    config, called = config | {"adapter": name}, config.get("adapter", "")
    try:
        if issubclass(kind, Around):
            part = kind(model.get_submodule(path), **config)
            replace(model, path, part)
            return part
        if not issubclass(kind, Beside):
            part = kind(**config)
            add_part(model.get_submodule(parent), child.removesuffix(f"_{called}"), part)
            return part
        base = model.get_submodule(path)
    except AttributeError:
        raise Unsupported(f"{folder.name}: the model has no {path}") from None
    wanted = (config.pop("out_features"), config.pop("in_features"))
    config.pop("bias")
    if matrix_shape(base) != wanted:
        raise Unsupported(f"{folder.name}: {path} is {list(matrix_shape(base))}, the adapter is for {list(wanted)}")
    part = kind.of(base, **config)
    replace(model, path, part)
    return part


def plain_path(path: str) -> str:
    """The path in the model as it was before anything stood round or in front of its modules."""
    return re.sub(r"\.(base|inner)(?=\.|$)", "", path)


def _own_tensors(part: nn.Module) -> dict[str, Tensor]:
    """Tensors of a module of an adapter that are not those of what it stands beside, by name."""
    beside, around = isinstance(part, Beside), isinstance(part, Around)
    theirs = [
        name
        for name, _ in stored_tensors(part)
        if (beside and ("." in name or name == "bias")) or (around and name.startswith("inner."))
    ]
    return {name: tensor.detach() for name, tensor in stored_tensors(part) if name not in theirs}


def make_folder(folder: Path) -> None:
    """A new folder. Raises `FileExistsError` if it holds anything."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
