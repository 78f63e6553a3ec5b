"""Compressed models on disk: safetensors, the configuration, and how the model differs from what that describes.

A model is saved as the difference from the skeleton that transformers builds from its configuration: modules put in
place of others, modules given a class of ours, attributes and shapes that are not the configuration's. One that does
not differ is an ordinary checkpoint. For all others plain transformers would fill what it does not know with fresh
random numbers without a word; here a missing, unexpected or misshapen tensor is fatal.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Unsupported
from effbench.nn.model.linear import Replaced, stored_as, stored_tensors, top_linears

CONFIG = "effbench.json"
WEIGHTS = "model.safetensors"
MASKS = "masks.safetensors"
HOMES = ("effbench.formats.", "effbench.nn.", "effbench.methods.")  # where classes may be loaded from
PLAIN = (bool, int, float)  # attributes of modules that are compared, by type

Described = dict[str, dict[str, Any]]


def save(model: Any, folder: Path, storage: torch.dtype, tokenizer: Any = None) -> int:
    """Write the model to a new folder, dense tensors in `storage`. Returns the bytes of all tensors.

    Raises `FileExistsError` if the folder holds anything, `Unsupported` if a module could not be built again."""
    replaced, changed = _differences(model, _skeleton(model))
    written, tied = _write(model, folder, storage, tokenizer)
    body = {"version": 1, "replaced": replaced, "changed": changed, "tied": tied}
    (folder / CONFIG).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    return written


def save_dense(model: Any, folder: Path, storage: torch.dtype, tokenizer: Any = None) -> int:
    """Write a checkpoint that plain transformers reads: every matrix dense, pruned weights as zeros, and where there
    are any, `masks.safetensors` with the bool [out, in] of each pruned linear by its path. Returns the bytes of all
    tensors of the checkpoint.

    The linears of `model` become dense ones. Raises `FileExistsError` if the folder holds anything, `Unsupported` if
    the configuration does not describe the shapes.
    """
    plain = _skeleton(model)
    masks: dict[str, Tensor] = {}
    for path, module in list(top_linears(model)):
        if isinstance(module, Replaced):
            keep = module.kept()
            if keep is not None:
                masks[path] = keep.to("cpu")
            model.set_submodule(path, _dense(module, isinstance(_module(plain, path, folder), Conv1D)))
    replaced, changed = _differences(model, plain)
    if replaced or changed:
        first = min([*replaced, *changed])
        raise Unsupported(f"{first}: its shape is not that of the configuration, which plain transformers goes by")
    written, _ = _write(model, folder, storage, tokenizer)
    if masks:
        save_file(masks, folder / MASKS, metadata={"format": "pt"})
    return written


def _dense(module: Replaced, transposed: bool) -> nn.Module:
    """The linear that multiplies by the same matrix, as a `Conv1D` where weights lie transposed."""
    weight = module.dense_weight()
    out_features, in_features = weight.shape
    if transposed:
        linear: nn.Module = Conv1D(out_features, in_features)
        linear.weight = nn.Parameter(weight.T.contiguous())
    else:
        linear = nn.Linear(in_features, out_features, bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.contiguous())
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().clone())
    return linear


def _skeleton(model: Any) -> nn.Module:
    """The model that transformers builds from the configuration, without memory."""
    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    return skeleton


def _differences(model: nn.Module, plain: nn.Module) -> tuple[Described, Described]:
    """Modules that stand in place of others, and modules changed in class, attributes or shapes, by path."""
    replaced: Described = {}
    changed: Described = {}
    _compare("", model, plain, replaced, changed)
    return replaced, changed


def _write(model: Any, folder: Path, storage: torch.dtype, tokenizer: Any) -> tuple[int, dict[str, str]]:
    """Tensors, configuration and tokenizer into a new folder; the bytes of all tensors, and names of tied ones."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(model):  # tied weights come once
        tensors[name] = tensor.detach().to("cpu", stored_as(tensor, storage)).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    tied = {name: target for name, target in _tied(model).items() if name not in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), tied


def load(folder: Path) -> Any:
    """The model that `save` wrote. Raises `Unsupported` if a tensor is missing, unexpected or of another shape."""
    body = json.loads((folder / CONFIG).read_text())
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config)
    for path, entry in sorted(body["replaced"].items()):  # what holds others comes before them
        parent, _, name = path.rpartition(".")
        module = _class(entry["class"])(**entry["config"])
        for parameter in module.parameters():
            parameter.data = parameter.data.to(model.dtype)
        setattr(_module(model, parent, folder), name, module)
    for path, entry in body["changed"].items():
        _change(_module(model, path, folder), entry, model.dtype)
    tensors = load_file(folder / WEIGHTS)
    expected = {name for name, _ in stored_tensors(model)} - set(body["tied"])
    for what, names in (("missing", expected - tensors.keys()), ("unexpected", tensors.keys() - expected)):
        if names:
            raise Unsupported(f"{folder.name}: {len(names)} tensors are {what}, the first is {sorted(names)[0]}")
    state = dict(stored_tensors(model))
    for name, tensor in tensors.items():
        target = state[name]
        if target.shape != tensor.shape:
            raise Unsupported(f"{folder.name}: {name} is {tuple(tensor.shape)}, expected {tuple(target.shape)}")
        with torch.no_grad():
            target.copy_(tensor)
    model.tie_weights()
    return model.eval()


def _compare(path: str, module: nn.Module, plain: nn.Module | None, replaced: Described, changed: Described) -> None:
    """Describe how `module` differs from `plain`, which the configuration would build in its place."""
    config = _config(module)
    if config is not None and (type(plain) is not type(module) or _config(plain) != config):
        replaced[path] = {"class": _named(module), "config": config}
        with torch.device("meta"):
            plain = type(module)(**config)
    entry: dict[str, Any] = {}
    if type(module) is not type(plain):
        if plain is None or not isinstance(module, type(plain)) or not type(module).__module__.startswith(HOMES):
            raise Unsupported(f"{path}: {_named(module)} cannot be built again from a configuration, so not saved")
        entry["class"] = _named(module)
    attributes = {name: value for name, value in _plain(module) if value != getattr(plain, name, None)}
    now, before = _shapes(module), _shapes(plain)
    shapes = {name: now.get(name) for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)}
    entry |= {"attributes": attributes} if attributes else {}
    entry |= {"shapes": shapes} if shapes else {}
    if entry:
        changed[path] = entry
    there = dict(plain.named_children())
    children = dict(module.named_children())
    if there.keys() - children.keys():
        gone = sorted(there.keys() - children.keys())[0]
        raise Unsupported(f"{path}.{gone} is gone, but the configuration still describes it: this cannot be saved")
    for name, child in children.items():
        _compare(f"{path}.{name}" if path else name, child, there.get(name), replaced, changed)


def _change(module: nn.Module, entry: dict[str, Any], dtype: torch.dtype) -> None:
    """Make `module` what `entry` describes, with empty tensors."""
    if "class" in entry:
        found = _class(entry["class"])
        if not issubclass(found, type(module)):
            raise Unsupported(f"{entry['class']} is no {_named(module)}")
        module.__class__ = found
    for name, value in entry.get("attributes", {}).items():
        setattr(module, name, value)
    for name, shape in entry.get("shapes", {}).items():
        old = getattr(module, name, None)
        empty = None if shape is None else torch.zeros(shape, dtype=dtype if old is None else old.dtype)
        if name in module._buffers:
            module.register_buffer(name, empty)
        else:
            module.register_parameter(name, None if empty is None else nn.Parameter(empty))


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes of `module` itself that are numbers or flags."""
    found = [(name, value) for name, value in vars(module).items() if type(value) in PLAIN]
    return [(name, value) for name, value in found if name != "training" and not name.startswith("_")]


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    """Shapes of the tensors that `module` itself holds and that are stored."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: list(tensor.shape) for name, tensor in own if name not in module._non_persistent_buffers_set}


def _config(module: nn.Module | None) -> dict[str, Any] | None:
    """Arguments that build an empty `module` again; None where only its place in the model can tell."""
    if type(module) is nn.Linear:
        return {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
        }
    own: Callable[[], dict[str, Any]] | None = getattr(module, "config", None)
    return own() if type(module).__module__.startswith(HOMES) and callable(own) else None


def _module(model: nn.Module, path: str, folder: Path) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise Unsupported(f"{folder.name}: the configuration describes no {path}") from error


def _tied(model: Any) -> dict[str, str]:
    """Names that share another name's tensor, as transformers ties them."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return dict(keys) if isinstance(keys, dict) else dict.fromkeys(keys, "")


def _named(module: nn.Module) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"


def _class(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if name != f"{nn.Linear.__module__}:Linear" and not module.startswith(HOMES):
        raise Unsupported(f"{name} is no format of effbench")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise Unsupported(f"{name} is no format of effbench")
    return found
