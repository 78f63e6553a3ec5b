"""Compressed models on disk: safetensors, the configuration, and how the model differs from what that describes.

A model is saved as the difference from the skeleton that transformers builds from its configuration: modules put in
place of others, modules given a class of ours, attributes and shapes that are not the configuration's. One that does
not differ is an ordinary checkpoint. For all others plain transformers would fill what it does not know with fresh
random numbers without a word; here a missing, unexpected or misshapen tensor is fatal.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME

from effbench.core.errors import Refused, Unsupported, first_line
from effbench.core.paths import PACKAGE
from effbench.nn.model.linear import Around, Replaced, Storage, matrix_dtype, stored_as, stored_tensors, top_linears

CONFIG = "effbench.json"
WEIGHTS = "model.safetensors"
MASKS = "masks.safetensors"
HOMES = ("formats", "nn", "methods")  # folders of the package with classes that an artifact may name
LINEAR = f"{nn.Linear.__module__}:Linear"
MOVED = {  # names of earlier files
    "effbench.methods.peft.lora:LoRALinear": "effbench.methods.peft._lowrank:LoRALinear",
    "effbench.methods.peft.prefix_tuning:Prefix": "effbench.methods.peft._prefix:Prefix",
}
PLAIN = (bool, int, float)  # attributes of modules that are compared, by type

Described = dict[str, dict[str, Any]]
Size = Annotated[int, Meta(ge=0, lt=2**48)]


class Replacement(msgspec.Struct, forbid_unknown_fields=True):
    """A module in the place of another: its class, and the arguments that build it."""

    kind: str = msgspec.field(name="class")
    config: dict[str, bool | int | float | str | None]


class Change(msgspec.Struct, forbid_unknown_fields=True):
    """How a module differs from the one that the configuration describes; a shape of None is no tensor."""

    kind: str | None = msgspec.field(name="class", default=None)
    attributes: dict[str, bool | int | float] = {}
    shapes: dict[str, list[Size] | None] = {}


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """What `effbench.json` holds: by path, how a model differs from its configuration, and names of tied tensors."""

    version: Literal[1]
    replaced: dict[str, Replacement]
    changed: dict[str, Change]
    tied: dict[str, str]


def save(model: Any, folder: Path, storage: torch.dtype | Storage) -> int:
    """Write the model to a new folder, dense tensors in `storage`. Returns the bytes of all tensors.

    Raises `FileExistsError` if the folder holds anything, `Unsupported` if a module could not be built again."""
    replaced, changed = _differences(model, _skeleton(model))
    written, tied = _write(model, folder, storage)
    body = {"version": 1, "replaced": replaced, "changed": changed, "tied": tied}
    (folder / CONFIG).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    return written


def save_dense(model: Any, folder: Path, storage: torch.dtype | Storage) -> int:
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
    written, _ = _write(model, folder, storage)
    if masks:
        _save_tensors(masks, folder / MASKS)
    return written


def measure_rounding(model: Any, storage: torch.dtype | Storage) -> float:
    """What `save_dense` loses: the greatest relative error, in the Frobenius norm, of a packed matrix in `storage`."""
    dtype = matrix_dtype(storage)
    weights = (module.dense_weight() for _, module in top_linears(model) if isinstance(module, Replaced))
    return max((float((w - w.to(dtype)).norm() / w.norm().clamp(min=1e-30)) for w in weights), default=0.0)


def _dense(module: Replaced, transposed: bool) -> nn.Module:
    """The linear that multiplies by the same matrix, as a `Conv1D` where weights lie transposed."""
    weight, bias = module.dense_weight(), module.dense_bias()
    out_features, in_features = weight.shape
    if transposed:
        linear: nn.Module = Conv1D(out_features, in_features)
        linear.weight = nn.Parameter(weight.T.contiguous())
    else:
        linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
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


def _write(model: Any, folder: Path, storage: torch.dtype | Storage) -> tuple[int, dict[str, str]]:
    """Tensors and configuration into a new folder; the bytes of all tensors, and names of tied ones."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(model):  # tied weights come once
        tensors[name] = tensor.detach().to("cpu", stored_as(name, tensor, storage)).contiguous()
    _save_tensors(tensors, folder / WEIGHTS)
    config = copy.deepcopy(model.config)
    config.dtype = matrix_dtype(storage)  # not that of the arithmetic here
    config.save_pretrained(folder)
    tied = {name: target for name, target in _tied(model).items() if name not in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), tied


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file of tensors that others may read."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes files private


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model that `save` wrote, its dense parameters in `dtype`.

    Raises `Unsupported` if the manifest or the configuration is not one that `save` could have written, or if a tensor
    is missing, unexpected or of another shape. All of that is seen before memory is taken: the model is built without
    memory first and held against the shapes that the file of tensors names. Raises `Refused` for NaN and infinity.
    """
    manifest = read_manifest(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with safe_open(folder / WEIGHTS, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        with torch.device("meta"):
            empty = _build(copy.deepcopy(config), manifest, folder, dtype)
        _check_shapes(empty, manifest, shapes, folder)
    except Unsupported:
        raise
    except Exception as error:  # whatever constructors and transformers raise on sizes that cannot be
        raise Unsupported(f"{folder.name} cannot be built: {first_line(error)}") from error
    model = _build(config, manifest, folder, dtype)
    state = dict(stored_tensors(model))
    for name, tensor in load_file(folder / WEIGHTS).items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise Unsupported(f"{folder.name}: {name} holds {tensor.dtype}, expected {state[name].dtype}")
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise Refused(f"{folder.name}: {name} holds NaN or infinity")
        with torch.no_grad():
            state[name].copy_(tensor)
    model.tie_weights()
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, its classes known to be ones of ours. Raises `Unsupported`."""
    try:
        manifest = msgspec.json.decode((folder / CONFIG).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise Unsupported(f"{folder.name}/{CONFIG}: {first_line(error)}") from None
    for kind in [*(entry.kind for entry in manifest.replaced.values()), *(c.kind for c in manifest.changed.values())]:
        if kind is not None and kind != LINEAR and kind not in buildable():
            raise Unsupported(f"{folder.name}/{CONFIG}: {kind!r} is no class of effbench's formats, models or methods")
    return manifest


@functools.cache
def buildable() -> frozenset[str]:
    """Every class, as `module:name`, that an artifact may name: those in the source of `HOMES`."""
    names = set()
    for home in HOMES:
        for path in (PACKAGE / home).rglob("*.py"):
            module = ".".join(("effbench", *path.relative_to(PACKAGE).with_suffix("").parts))
            names |= {f"{module}:{name}" for name in re.findall(r"^class (\w+)", path.read_text("utf-8"), re.MULTILINE)}
    return frozenset(names | MOVED.keys())


def _build(config: Any, manifest: Manifest, folder: Path, dtype: torch.dtype) -> Any:
    """The model of a configuration and a manifest, its stored tensors empty."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for path, entry in sorted(manifest.replaced.items()):  # what holds others comes before them
        parent, _, name = path.rpartition(".")
        kind = build_class(entry.kind)
        inner = (_module(model, path, folder),) if issubclass(kind, Around) else ()
        module = kind(*inner, **entry.config)
        for parameter in module.parameters():
            parameter.data = parameter.data.to(model.dtype)
        _module(model, parent, folder).add_module(name, module)
    for path, change in manifest.changed.items():
        _change(_module(model, path, folder), change, model.dtype)
    return model


def _check_shapes(model: Any, manifest: Manifest, shapes: Mapping[str, Sequence[int]], folder: Path) -> None:
    """Raise `Unsupported` unless the model stores tensors of just these names and shapes."""
    untied = sorted(manifest.tied.keys() - _tied(model).keys())
    if untied:
        raise Unsupported(f"{folder.name}: {untied[0]} is not tied to another tensor, and so must be stored")
    state = dict(stored_tensors(model))
    expected = state.keys() - manifest.tied.keys()
    for what, names in (("missing", expected - shapes.keys()), ("unexpected", shapes.keys() - expected)):
        if names:
            raise Unsupported(f"{folder.name}: {len(names)} tensors are {what}, the first is {sorted(names)[0]}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != tuple(shape):
            raise Unsupported(f"{folder.name}: {name} is {tuple(shape)}, expected {tuple(state[name].shape)}")


def _compare(path: str, module: nn.Module, plain: nn.Module | None, replaced: Described, changed: Described) -> None:
    """Describe how `module` differs from `plain`, which the configuration would build in its place."""
    config = _config(module)
    if config is not None and (type(plain) is not type(module) or _config(plain) != config):
        replaced[path] = {"class": name_class(module), "config": config}
        with torch.device("meta"):
            plain = type(module)(*([plain] if isinstance(module, Around) else []), **config)
    entry: dict[str, Any] = {}
    if type(module) is not type(plain):
        if plain is None or not isinstance(module, type(plain)) or name_class(module) not in buildable():
            raise Unsupported(f"{path}: {name_class(module)} cannot be built again from a configuration, so not saved")
        entry["class"] = name_class(module)
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


def _change(module: nn.Module, change: Change, dtype: torch.dtype) -> None:
    """Make `module` what `change` describes, with empty tensors. Raises `Unsupported`."""
    if change.kind is not None:
        kind = build_class(change.kind)
        if not issubclass(kind, type(module)):
            raise Unsupported(f"{change.kind} is no {name_class(module)}")
        module.__class__ = kind
    for name, value in change.attributes.items():
        if name.startswith("_") or type(getattr(module, name, None)) not in (*PLAIN, type(None)):
            raise Unsupported(f"{name_class(module)}.{name} is no number and no flag, and cannot become {value}")
        setattr(module, name, value)
    for name, shape in change.shapes.items():
        old = getattr(module, name, None)
        if old is not None and not isinstance(old, Tensor):
            raise Unsupported(f"{name_class(module)}.{name} is no tensor")
        empty = None if shape is None else torch.zeros(shape, dtype=dtype if old is None else old.dtype)
        if name in module._buffers:
            module.register_buffer(name, empty)
        else:
            module.register_parameter(name, None if empty is None else nn.Parameter(empty))


def _plain(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes of `module` itself that are numbers or flags."""
    values = [(name, value) for name, value in vars(module).items() if type(value) in PLAIN]
    return [(name, value) for name, value in values if name != "training" and not name.startswith("_")]


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
    return own() if module is not None and callable(own) and name_class(module) in buildable() else None


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


def name_class(module: nn.Module) -> str:
    """How a manifest names the class of a module."""
    return f"{type(module).__module__}:{type(module).__qualname__}"


def build_class(name: str) -> Any:
    """The class that a checked manifest names. Raises `Unsupported` for one that is no module."""
    module, _, attribute = MOVED.get(name, name).partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise Unsupported(f"{name} is no module of a model")
    return kind
