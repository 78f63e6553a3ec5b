"""What a checkpoint says besides the values of its tensors: the types they are stored in, and the files beside them."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from effbench.nn.files.artifact import CONFIG
from effbench.nn.files.headers import Header, read_safetensors
from effbench.nn.model.linear import Storage, is_vector, matrix_dtype

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TENSORS = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")  # suffixes of files of tensors
INDEX = ".index.json"  # how the name of a file ends that says which tensor is in which file
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as headers name them


def read_headers(location: Path | str, revision: str | None) -> dict[str, Header]:
    """Headers of the safetensors of a folder or of a model on the Hub, by name; empty where it has none.

    Raises `Unsupported` for a file that is none or not whole.
    """
    options: dict[str, Any] = {"revision": revision or "main", "_raise_exceptions_for_missing_entries": False}
    whole = cached_file(location, SAFE_WEIGHTS_NAME, **options)
    index = None if whole else cached_file(location, SAFE_WEIGHTS_INDEX_NAME, **options)
    files = [whole] if whole else []
    if index is not None:
        files, _ = get_checkpoint_shard_files(str(location), index, revision=options["revision"])
    headers: dict[str, Header] = {}
    for path in files:
        headers |= read_safetensors(Path(path))
    return headers


def choose_storage(headers: Mapping[str, Header], packed: torch.dtype = torch.bfloat16) -> torch.dtype | Storage:
    """The types that dense tensors are kept in: 16 bits for the matrices, those that most of them have.

    Matrices in float32 become bfloat16, those in no type of torch's become `packed`. Vectors that lie in float32 beside
    narrower matrices keep it.
    """
    sizes: Counter[str] = Counter()
    for name, header in headers.items():
        if name.endswith("weight") and len(header.shape) > 1:
            sizes[header.dtype] += math.prod(header.shape)
    most = max(sizes, key=sizes.__getitem__, default="F32")
    if most == "F32":
        return torch.bfloat16
    matrices = DTYPES.get(most, packed)
    wide = any(header.dtype == "F32" for name, header in headers.items() if is_vector(name, len(header.shape)))
    return Storage(matrices, torch.float32) if wide else matrices


def describe_headers(headers: Mapping[str, Header], storage: torch.dtype | Storage) -> str:
    """How a checkpoint is stored: `Q4_1 linears, Q8_0 embedding and head, F32 norms`, or one type if all have it.

    Where the model at work keeps matrices in none of these types, it says in which.
    """
    types: dict[str, Counter[str]] = {"linears": Counter(), "embedding and head": Counter(), "norms": Counter()}
    for name, header in headers.items():
        inside = any(part.isdigit() for part in name.split("."))  # of a block
        kind = "norms" if len(header.shape) < 2 else "linears" if inside else "embedding and head"
        types[kind][header.dtype] += math.prod(header.shape)
    found = {kind: " and ".join(name for name, _ in sizes.most_common()) for kind, sizes in types.items() if sizes}
    told = found["linears"] if len(set(found.values())) == 1 else ", ".join(f"{t} {k}" for k, t in found.items())
    kept = matrix_dtype(storage)
    there = {DTYPES.get(header.dtype) for header in headers.values() if len(header.shape) > 1}
    return told if there == {kept} else f"{told}; matrices are measured in {str(kept).removeprefix('torch.')}"


def keep_beside(folder: Path, origin: Path | None, model: Any, tokenizer: Any) -> None:
    """Put beside a saved model all that its checkpoint says besides tensors, as it stands there.

    origin     folder of the checkpoint; None where it is no folder
    tokenizer  to be saved in place of the checkpoint's; None if it is the checkpoint's own or there is none

    What is in no file (a GGUF file holds everything in one) is written from the model and the tokenizer.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    paths = [] if origin is None else [(path, path.relative_to(origin)) for path in sorted(origin.rglob("*"))]
    for path, inside in paths:
        hidden = any(name.startswith(".") for name in inside.parts[:-1])  # .git, and what the Hub's client keeps
        tensors = path.suffix in TENSORS or path.name.endswith(INDEX)
        if path.is_file() and not (hidden or tensors or path.name == CONFIG or (folder / inside).exists()):
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / inside)
    if not (folder / GENERATION_CONFIG_NAME).exists() and model.generation_config is not None:
        (folder / GENERATION_CONFIG_NAME).write_text(model.generation_config.to_json_string())


def stop_ids(model: Any) -> set[int]:
    """Tokens at which the checkpoint says that a text ends."""
    settings = getattr(model, "generation_config", None)
    ids = getattr(settings, "eos_token_id", None)
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
