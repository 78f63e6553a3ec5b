"""Local models whose files are broken are refused before anything runs: one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gguf import write
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from effbench import sources, tiny
from effbench.checks import TOYS, toy
from effbench.cli import main as cli
from effbench.core.errors import Unsupported, Usage
from effbench.nn.files.load import check_model, open_run

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST = "model.layers.0.mlp.up_proj.weight"


def make(folder: Path, architecture: str = "llama", shards: str = "1GB") -> Path:
    """A random toy with the tokenizer that ships."""
    model = toy(architecture)
    model.resize_token_embeddings(
        len(AutoTokenizer.from_pretrained(tiny.MODEL)) + 8
    )  # of which some tokenizers add one
    model.save_pretrained(folder, max_shard_size=shards)
    for path in Path(tiny.MODEL).glob("*token*"):
        shutil.copy(path, folder)
    return folder


def cut(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def configure(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def change_tensors(**values: torch.Tensor | None) -> Callable[[Path], Any]:
    """Tensors put in place of others, taken away where None; __ stands for a dot."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in values.items()}
        left = {name: value for name, value in tensors.items() if value is not None}
        save_file(left, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def remove(*patterns: str) -> Callable[[Path], Any]:
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def change_vocabulary(folder: Path) -> None:
    toy().save_pretrained(folder)


BROKEN = {
    "torn": (cut(WEIGHTS, 1000), f"{WEIGHTS}: is no whole safetensors file"),
    "short": (cut(WEIGHTS, 30000), f"{WEIGHTS}: is no whole safetensors file"),
    "empty": (put(WEIGHTS, b""), f"{WEIGHTS}: is empty"),
    "pointer": (put(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "git lfs pull"),
    "none": (remove(WEIGHTS), "holds no *.safetensors"),
    "no json": (put("config.json", b"{"), "config.json"),
    "list": (put("config.json", b"[]"), "config.json holds a list, must be an object"),
    "type": (configure(model_type="bert"), "architecture 'bert' is not one of"),
    "unknown type": (configure(model_type="toy"), "config.json"),
    "width": (
        configure(intermediate_size=64),
        "mlp.down_proj.weight is [128, 256], the configuration asks for [128, 64]",
    ),
    "more layers": (configure(num_hidden_layers=3), "missing keys, the first is model.layers.2"),
    "fewer layers": (configure(num_hidden_layers=1), "unexpected keys, the first is model.layers.1"),
    "no layers": (configure(num_hidden_layers=0), "num_hidden_layers is 0"),
    "lacking": (
        change_tensors(**{FIRST.replace(".", "__"): None}),
        "1 missing keys, the first is model.layers.0.mlp.up_proj.weight",
    ),
    "shape": (
        change_tensors(**{FIRST.replace(".", "__"): torch.zeros(8, 8)}),
        f"{FIRST} is [8, 8], the configuration asks for [256, 128]",
    ),
    "no tokenizer": (remove("*token*"), "no tokenizer"),
    "vocabulary": (change_vocabulary, "they do not belong together"),
    "tokenizer": (cut("tokenizer.json", 100), "the tokenizer of"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_before_anything_runs(tmp_path, capsys, kind):
    damage, message = BROKEN[kind]
    folder = make(tmp_path / "model")
    damage(folder)
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        command = ["run", "recipe=rtn()", f"model={folder}", "data=speeches", f"results={tmp_path / 'runs'}", *more]
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"effbench: model={folder}: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "runs").exists()


def test_a_missing_shard_is_refused(tmp_path):
    folder = make(tmp_path / "model", shards="200KB")
    check(folder)
    names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    (folder / names[1]).unlink()
    with pytest.raises(Usage, match=names[1]):
        check(folder)


def check(folder: Path | str) -> None:
    from effbench.cells.plan import check_files

    check_files(sources.model(str(folder)), ["perplexity"])


@pytest.mark.parametrize("architecture", TOYS)
def test_a_whole_folder_is_not_refused(tmp_path, architecture):
    folder = make(tmp_path / "model", architecture)
    check(folder)
    short = {
        name.partition(".")[2]: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "lm_head" not in name
    }
    if toy(architecture).config.tie_word_embeddings:
        save_file(short, folder / WEIGHTS, metadata={"format": "pt"})  # as the model without its head was saved
        check(folder)


def test_a_model_without_a_tokenizer_may_be_timed(tmp_path):
    folder = make(tmp_path / "model")
    remove("*token*")(folder)
    check_model(sources.model(str(folder)), reads_text=False)


GGUF_BROKEN = {
    "1 kB": (lambda data: data[:1000], "was cut off in its header"),
    "half": (lambda data: data[: len(data) * 3 // 4], "was cut off at byte"),
    "last byte": (lambda data: data[:-40], "was cut off at byte"),
    "other": (lambda data: b"nothing of the kind" * 9, "is not a GGUF file"),
    "empty": (lambda data: b"", "is empty"),
    "version": (lambda data: data[:4] + (99).to_bytes(4, "little") + data[8:], "is GGUF version 99, known are 2 and 3"),
    "architecture": (lambda data: data.replace(b"llama", b"bertx"), "architecture 'bertx' is not one of"),
    "tensor": (
        lambda data: data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ux.weight"),
        "lacks the tensor blk.1.ffn_up.weight",
    ),
    "layers": (lambda data: data.replace(b"blk.1.", b"blk.7."), "lacks the tensor blk.1."),
}


@pytest.mark.parametrize("kind", GGUF_BROKEN)
def test_a_broken_gguf_file_is_refused_before_anything_runs(tmp_path, capsys, kind):
    damage, message = GGUF_BROKEN[kind]
    path = write(tmp_path / "toy.gguf")
    check(f"gguf:{path}")
    path.write_bytes(damage(path.read_bytes()))
    command = ["run", "recipe=rtn()", f"model=gguf:{path}", "data=speeches", f"results={tmp_path / 'runs'}"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"effbench: model=gguf:{path}: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": None}, "holds no tokenizer"),
        ({"tokenizer.ggml.tokens": None}, "holds no tokenizer"),
        ({"llama.feed_forward_length": 64}, "asks for"),
        ({"llama.feed_forward_length": 97}, "asks for"),
        ({"llama.block_count": 1}, "holds 20 tensors, of which 11 are read"),
    ],
)
def test_gguf_metadata_that_do_not_fit_are_refused(tmp_path, metadata, message):
    path = write(tmp_path / "toy.gguf", **metadata)
    with pytest.raises(Usage, match=message):
        check(f"gguf:{path}")
    source = sources.model(f"gguf:{path}", "tiny" if "tokenizer" in message else None)
    with pytest.raises(Unsupported, match="belong together" if "tokenizer" in message else message):
        open_run(source, sources.data("speeches"), "cpu", None, 0, {"calibration_length": 32})


def test_files_given_as_models_get_a_hint(tmp_path):
    folder = make(tmp_path / "model")
    path = write(tmp_path / "toy.gguf")
    for name, hint in {
        str(path): f"write model=gguf:{path}",
        str(tmp_path): f"write model=gguf:{path}",
        str(folder / WEIGHTS): f"is a file; write model={folder}, the folder that holds it",
        str(folder / "config.json"): f"write model={folder}",
        str(tmp_path / "other.gguf"): "no such file; GGUF files are written gguf:FILE",
        f"gguf:{folder}": "no such file",
    }.items():
        with pytest.raises(Usage) as caught:
            sources.model(name)
        assert str(caught.value).startswith(f"model={name}: ") and hint in str(caught.value), name
