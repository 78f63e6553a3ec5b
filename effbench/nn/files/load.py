"""Models: from a local folder, a GGUF file, the hub, a public shape with random weights, or the one that ships."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import CONFIG_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from effbench import sources, tiny
from effbench.core.errors import Outcome, OutOfMemory, Refused, Unsupported, first_line
from effbench.machine.devices import gib
from effbench.nn.data import LONGEST, Data, RandomTokens, open_data
from effbench.nn.files import artifact
from effbench.nn.files.checkpoint import PICKLES, choose_storage, describe_headers, read_headers
from effbench.nn.files.gguf import Gguf, open_gguf
from effbench.nn.files.headers import Header
from effbench.nn.model.blocks import Blocks, check_architecture, count_positions
from effbench.nn.model.experts import mixture_config, upcycle
from effbench.nn.model.linear import Storage, matrix_dtype, matrix_shape
from effbench.nn.run import ModelRun, round_to
from effbench.sources.shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from effbench.sources import DataSource, Source

SIZES = {  # what every configuration counts, with the most that is taken for a model
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "max_position_embeddings": 2**27,
}


def open_run(
    source: Source,
    data: DataSource,
    device: str,
    dtype: str | None,
    seed: int,
    settings: dict[str, Any] | None = None,
) -> ModelRun:
    """The model and data of one cell, ready for its recipe.

    `dtype` is that of the arithmetic: float32 on a processor and as stored on a GPU by default. `settings` may hold
    `calibration_sequences`, `calibration_length` (tokens) and `skip` (patterns of linears to leave alone).
    Raises `Unsupported`, `Refused` or `OutOfMemory` for a model that cannot be used.
    """
    settings = settings or {}
    place = torch.device(device)
    config, headers, storage = describe_model(source)
    compute = getattr(torch, dtype) if dtype else torch.float32 if place.type == "cpu" else matrix_dtype(storage)
    build = functools.partial(open_model, source, config, place, compute)
    tokenizer = _tokenizer(source)
    if source.kind == "shape":
        _check_shape(config, place, compute)
    model = build()
    positions = count_positions(model)
    width = min(LONGEST, positions)
    length = settings.get("calibration_length") or width
    if length > positions:
        raise Unsupported(f"calibration_length is {length} tokens, the model has {positions} positions")
    texts: Data = (
        RandomTokens(model.config.vocab_size) if source.kind == "shape" else open_data(data, tokenizer, width, length)
    )
    _check_vocabulary(tokenizer, config)
    run = ModelRun(
        source,
        model,
        functools.partial(_beside, build, config, place, compute) if source.kind == "shape" else build,
        tokenizer,
        texts,
        device=place,
        storage=storage,
        seed=seed,
        sequences=int(settings.get("calibration_sequences") or 128),
        length=length,
        skip=tuple(settings.get("skip") or ()),
    )
    if source.kind == "hub":
        run.log.commit = config._commit_hash
    if headers and not _is_artifact(source.location):
        run.log.model_types = describe_headers(headers, storage)
    return run


def describe_model(source: Source) -> tuple[Any, dict[str, Header], torch.dtype | Storage]:
    """The configuration of a model, what its files say of its tensors, and the types that an artifact keeps these in.

    No weights are read. Raises as `open_run`.
    """
    config, headers = _config(source), _headers(source)
    packed = torch.float16 if source.kind == "gguf" else torch.bfloat16  # what scales of llama.cpp's formats are in
    return config, headers, choose_storage(headers, packed)


def check_model(source: Source, reads_text: bool) -> None:
    """Raise `Unsupported` or `Refused` for a local model that cannot be opened, as far as that shows without weights.

    A model that is to read text needs a tokenizer.
    """
    config, folder = _config(source), source.location
    headers = _headers(source)
    tokenizer = _tokenizer(source)
    if tokenizer is None and reads_text:
        raise Unsupported("the model's folder has no tokenizer: name one with tokenizer=")
    _check_vocabulary(tokenizer, config)
    if source.kind == "gguf":
        _check_tensors(_gguf(source), config)
    elif _is_artifact(folder):
        artifact.read_manifest(folder)
    else:
        _check_weights(folder)
        if headers:
            _load(folder, _name(folder), torch.float32, device_map="meta", **_in_safetensors(folder))


def open_beside(source: Source, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model of a source and its tokenizer, for a run on another model. Raises as `open_run`."""
    config, tokenizer = _config(source), _tokenizer(source)
    _check_vocabulary(tokenizer, config)
    return open_model(source, config, device, dtype), tokenizer


@functools.cache
def linear_shapes(source: Source) -> dict[str, tuple[int, int]]:
    """[out, in] of the linears of all blocks by path, as the configuration has them. Raises `Unsupported`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(source))
    return {path: matrix_shape(module) for path, module in Blocks(model).linears()}


def open_model(source: Source, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The original model of a source, in `dtype` on `device`."""
    if source.kind == "shape":
        return build_random(config, device, dtype)
    folder = source.location
    if source.kind == "gguf":
        return read_gguf(_gguf(source), config, dtype).to(device)
    if _is_artifact(folder):
        return artifact.load(folder, dtype).to(device, dtype)
    model = read(folder, dtype, source.revision)
    return (upcycle(model, config) if source.experts else model).to(device)


def read(folder: Path | str, dtype: torch.dtype, revision: str | None = None) -> Any:
    """A transformers checkpoint in safetensors. Damaged files, absent tensors and NaN are outcomes."""
    _check_weights(folder)
    return _read(folder, _name(folder), dtype, **_in_safetensors(folder, revision))


def _in_safetensors(folder: Path | str, revision: str | None = None) -> dict[str, Any]:
    return {
        "revision": revision or "main",
        "use_safetensors": True,
        "local_files_only": isinstance(folder, Path),
    }


def read_gguf(file: Gguf, config: Any, dtype: torch.dtype) -> Any:
    """The model of a GGUF file, its tensors decoded. What cannot be read, or is not read in full, is an outcome."""
    _check_tensors(file, config)
    model = _read(
        file.path.parent,
        file.path.name,
        dtype,
        config=copy.deepcopy(config),  # spares reading the metadata once more
        gguf_file=file.path.name,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    vars(model).pop("is_quantized", None)  # once decoded it is a model like any other, and saved as one
    stops = file.stop_ids()
    model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    return model


def _check_tensors(file: Gguf, config: Any) -> None:
    """Raise `Unsupported` unless a GGUF file has the tensors of its configuration: transformers takes any shapes."""
    with torch.device("meta"):
        file.check_tensors(AutoModelForCausalLM.from_config(config))


def _read(folder: Path | str, name: str, dtype: torch.dtype, **options: Any) -> Any:
    """What transformers reads, checked: every tensor is there, and finite."""
    model = _load(folder, name, dtype, **options)
    for path, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            if dtype is torch.float16:  # whose range what is in the files may exceed
                round_to(dtype, f"{name}: {path}", _read(folder, name, torch.float32, **options).get_parameter(path))
            raise Refused(f"{name}: {path} holds NaN or infinity")
    return model


def _load(folder: Path | str, name: str, dtype: torch.dtype, **options: Any) -> Any:
    """What transformers reads. Raises `Unsupported` unless it has every tensor that the configuration asks for."""
    with _quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in `info`, by name
                **options,
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever safetensors and transformers raise on damaged or foreign files
            raise Unsupported(f"{name} cannot be read: {first_line(error)}") from error
    model, info = loaded
    for key, found, asked in sorted(info["mismatched_keys"]):
        raise Unsupported(f"{name}: {key} is {list(found)}, the configuration asks for {list(asked)}")
    for what in ("missing_keys", "unexpected_keys"):
        if info[what]:
            first = sorted(map(str, info[what]))[0]
            raise Unsupported(f"{name}: {len(info[what])} {what.replace('_', ' ')}, the first is {first}")
    return model


def _check_weights(folder: Path | str) -> None:
    """Raise `Refused` for a folder of pickles, `Unsupported` for one without weights."""
    if isinstance(folder, Path) and not list(folder.glob("*.safetensors")):
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        if pickles:
            raise Refused(f"{pickles[0]} is a pickle, which can run code when read: save it as safetensors")
        raise Unsupported(f"{folder.name} holds no *.safetensors")


def _gguf(source: Source) -> Gguf:
    return open_gguf(sources.open_file(source), source.digest)


def _is_artifact(folder: Path | str) -> TypeGuard[Path]:
    return isinstance(folder, Path) and (folder / artifact.CONFIG).is_file()


def find_folder(source: Source) -> Path | None:
    """The folder with the files of a checkpoint; None for a shape, and for a GGUF file, which is all in one."""
    if source.kind in ("shape", "gguf"):
        return None
    if isinstance(source.location, Path):
        return source.location
    return Path(str(cached_file(source.location, CONFIG_NAME, revision=source.revision or "main"))).parent


def _name(folder: Path | str) -> str:
    return folder.name if isinstance(folder, Path) else folder


def build_random(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights in the shape of a real model, built on the device; the same whenever they are built."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        # A copy: methods change the configuration, and the reference is built from it later.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


class Needs(NamedTuple):
    """Bytes that a model takes up, found without building it."""

    weights: int
    work: int  # float32 copy of the largest matrix in its blocks: the least that a method works with


def needs(config: Any, dtype: torch.dtype) -> Needs:
    """What a model of this configuration takes up in `dtype`; tied weights count once."""
    model = build_random(config, torch.device("meta"), dtype)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
    work = max(linear.get_parameter("weight").numel() for _, linear in Blocks(model).linears())
    return Needs(weights, work * torch.float32.itemsize)


def _check_shape(config: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `OutOfMemory` before anything is allocated for a shape that cannot fit."""
    weights, work = needs(config, dtype)
    free, total, _ = _memory(device)
    if weights + work > free:
        raise OutOfMemory(
            f"the weights take {gib(weights)}, a method's work at least {gib(work)} more and the unchanged model that "
            f"speed is compared with as much again; {gib(free)} of {gib(total)} are free on {device}",
            asked_bytes=weights + work,
            free_bytes=free,
            total_bytes=total,
        )


def _beside(build: Callable[[], Any], config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The unchanged model beside the one at work.

    Raises `Unsupported` where the device is too small for both, `OutOfMemory` where something else is in the way.
    """
    weights = needs(config, dtype).weights
    free, total, held = _memory(device)
    if weights > free:
        message = (
            f"the unchanged model takes {gib(weights)} beside the {gib(held)} in use by this cell; "
            f"{gib(free)} of {gib(total)} are free on {device}"
        )
        if weights + held > total:
            raise Unsupported(message)
        raise OutOfMemory(message, asked_bytes=weights, free_bytes=free, total_bytes=total)
    return build()


def _memory(device: torch.device) -> tuple[int, int, int]:
    """Bytes of a device that are free, that there are, and that this process holds."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return (*torch.cuda.mem_get_info(device), torch.cuda.memory_allocated(device))
    import psutil

    memory = psutil.virtual_memory()
    return memory.available, memory.total, psutil.Process().memory_info().rss


def _config(source: Source) -> Any:
    if source.kind == "shape":
        body = dict(SHAPES[source.name.partition(":")[2]])
        return AutoConfig.for_model(body.pop("model_type"), **body)
    folder = source.location
    if source.kind == "gguf":
        check_architecture(_gguf(source).architecture)  # transformers asks for packages to say that it knows none
    elif isinstance(folder, Path):
        _check_object(folder / CONFIG_NAME)
    try:
        config = (
            _gguf(source).config()
            if source.kind == "gguf"
            else AutoConfig.from_pretrained(
                folder,
                revision=source.revision or "main",
                trust_remote_code=False,
                local_files_only=isinstance(folder, Path),
            )
        )
    except Unsupported:
        raise
    except Exception as error:
        what = "" if source.kind == "gguf" else "config.json "
        raise Unsupported(f"{_name(folder)}: {what}cannot be read: {first_line(error)}") from error
    check_architecture(config.model_type)
    for name, most in SIZES.items():
        value = getattr(config, name, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise Unsupported(f"{_name(folder)}: config.json: {name} is {value!r}, must be from 1 to {most}")
    return mixture_config(config, source.experts, sources.CHOSEN) if source.experts else config


def _check_object(path: Path) -> None:
    """Raise `Unsupported` for JSON that is no object; what is no JSON is left to transformers."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if not isinstance(body := json.loads(path.read_bytes()), dict):
            raise Unsupported(f"{path.parent.name}: {path.name} holds a {type(body).__name__}, must be an object")


def _headers(source: Source) -> dict[str, Header]:
    """What the files of a model say of its tensors; nothing for a shape, and where they cannot be read."""
    if source.kind == "shape":
        return {}
    if source.kind == "gguf":
        return _gguf(source).headers
    try:
        return read_headers(source.location, source.revision)
    except Outcome:
        raise
    except Exception as error:
        raise Unsupported(f"{_name(source.location)} cannot be read: {first_line(error)}") from error


def _tokenizer(source: Source) -> Any:
    """The tokenizer named, or the one beside the model; None where there is none."""
    if source.kind == "shape":
        return None
    named = str(tiny.MODEL) if source.tokenizer == "tiny" else source.tokenizer
    folder = named or source.location
    if named is None and source.kind == "gguf":
        return _gguf(source).tokenizer()
    if named is None and isinstance(folder, Path) and not list(folder.glob("tokenizer*")) + list(folder.glob("vocab*")):
        return None
    with _quiet():
        try:
            return AutoTokenizer.from_pretrained(
                folder,
                revision="main" if named else source.revision or "main",
                trust_remote_code=False,
                local_files_only=Path(folder).is_dir(),
            )
        except Exception as error:
            raise Unsupported(f"the tokenizer of {_name(folder)} cannot be read: {first_line(error)}") from error


def _check_vocabulary(tokenizer: Any, config: Any) -> None:
    """Raise `Unsupported` for a tokenizer with tokens that the model has not."""
    if tokenizer is None:
        return
    ids = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if ids > config.vocab_size:
        raise Unsupported(
            f"the tokenizer has tokens up to {ids - 1}, the model {config.vocab_size} in all: "
            "they do not belong together"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers while a checkpoint is read: what matters comes back as an outcome."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its GGUF reader has a progress bar of its own
            yield
    finally:
        transformers_logging.set_verbosity(level)
