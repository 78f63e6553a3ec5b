"""What must hold of the files of a model before anything runs, as far as their headers and their JSON tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from effbench.core.errors import Refused, Unsupported
from effbench.core.usage import list_some
from effbench.sources.headers import Header, read_gguf, read_json, read_safetensors
from effbench.sources.layout import check_architecture, check_gguf_tensors, check_tensors

CONFIG = "config.json"
MANIFEST = "effbench.json"  # how a model that effbench has saved differs from what its configuration describes
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # which tensor is in which file
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
JSON = (  # that are read
    CONFIG,
    MANIFEST,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def find_weights(folder: Path) -> list[Path]:
    """The safetensors of a checkpoint, in one file or in those that its index names.

    Raises `Refused` where there are only pickles, `Unsupported` where there are none or one is missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        if pickles:
            raise Refused(f"{pickles[0]} is a pickle, which can run code when read: save it as safetensors")
        raise Unsupported(f"{folder.name} holds no {WEIGHTS}")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
        raise Unsupported(f"{INDEX}: weight_map does not say which tensor is in which file")
    names = sorted(set(places.values()))
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise Unsupported(f"{INDEX} names {list_some(lacking)}, which the folder does not hold: copy or download again")
    return [folder / name for name in names]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary."""
    return any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern))


def read_tensors(folder: Path) -> dict[str, Header]:
    """Headers of all tensors of a checkpoint. Raises as `find_weights` and `read_safetensors` do."""
    headers: dict[str, Header] = {}
    for path in find_weights(folder):
        headers |= read_safetensors(path)
    return headers


def check_folder(folder: Path) -> None:
    """Raise `Refused` or `Unsupported` for a checkpoint that cannot be opened."""
    _check_json(folder)
    config = read_json(folder / CONFIG)
    check_architecture(config.get("model_type"))
    headers = read_tensors(folder)
    if not ((folder / MANIFEST).is_file() or "quantization_config" in config):  # which store other tensors
        check_tensors(config, CONFIG, headers)


def check_gguf(path: Path, takes_tokenizer: bool) -> None:
    """Raise `Unsupported` for a GGUF file that cannot be opened; it needs a tokenizer if that is taken from it."""
    header = read_gguf(path)
    check_gguf_tensors(header.metadata, path.name, header.tensors)
    if takes_tokenizer and not has_gguf_tokenizer(header.metadata):
        raise Unsupported(f"{path.name} holds no tokenizer; name the authors' own with tokenizer=")


def has_gguf_tokenizer(metadata: Mapping[str, object]) -> bool:
    """Whether the metadata of a GGUF file describe a tokenizer."""
    return {"tokenizer.ggml.model", "tokenizer.ggml.tokens"} <= metadata.keys()


def check_tokenizer(folder: Path) -> None:
    """Raise `Unsupported` for a folder without a tokenizer that can be read."""
    _check_json(folder)
    if not has_tokenizer(folder):
        raise Unsupported(f"{folder.name} holds no tokenizer; name a folder that has one with tokenizer=")


def _check_json(folder: Path) -> None:
    for name in JSON:
        if (folder / name).is_file():
            read_json(folder / name)
