"""Compressed models on disk: safetensors, the configuration, and a list of what replaced which linear.

Plain transformers cannot hold packed weights: it would fill replaced linears with fresh random numbers without a
word. Here a missing or unexpected tensor is fatal.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.core.errors import Unsupported
from effbench.nn.linear import Replaced, stored_as, stored_tensors

CONFIG = "effbench.json"
WEIGHTS = "model.safetensors"
HOMES = ("effbench.formats.", "effbench.nn.", "effbench.methods.")  # where classes may be loaded from


def save(model: Any, folder: Path, storage: torch.dtype, tokenizer: Any = None) -> int:
    """Write the model to a new folder, dense tensors in `storage`. Returns the bytes of all tensors.

    Raises `FileExistsError` if the folder holds anything."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(model):  # tied weights come once
        tensors[name] = tensor.detach().to("cpu", stored_as(tensor, storage)).contiguous()
    tied = {name: target for name, target in _tied(model).items() if name not in tensors}
    replaced = {
        path: {"class": f"{type(module).__module__}:{type(module).__qualname__}", "config": module.config()}
        for path, module in _replaced(model)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    body = {"version": 1, "replaced": replaced, "tied": tied}
    (folder / CONFIG).write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def load(folder: Path) -> Any:
    """The model that `save` wrote. Raises `Unsupported` if a tensor is missing, unexpected or of another shape."""
    body = json.loads((folder / CONFIG).read_text())
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config)
    for path, entry in body["replaced"].items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _class(entry["class"])(**entry["config"]))
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


def _replaced(model: nn.Module, prefix: str = "") -> list[tuple[str, Replaced]]:
    """Outermost replaced linears; what they hold is theirs to rebuild."""
    found: list[tuple[str, Replaced]] = []
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        found += [(path, child)] if isinstance(child, Replaced) else _replaced(child, path)
    return found


def _tied(model: Any) -> dict[str, str]:
    """Names that share another name's tensor, as transformers ties them."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    keys = getattr(model, "_tied_weights_keys", None) or {}
    return dict(keys) if isinstance(keys, dict) else dict.fromkeys(keys, "")


def _class(name: str) -> type[Replaced]:
    module, _, attribute = name.partition(":")
    if not module.startswith(HOMES):
        raise Unsupported(f"{name} is no format of effbench")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Replaced)):
        raise Unsupported(f"{name} is no format of effbench")
    return found
