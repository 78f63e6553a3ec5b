"""What files say of tensors decides how the model is kept, whatever the configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from effbench import sources, tiny
from effbench.checks import toy
from effbench.core.errors import Refused
from effbench.core.recipe import parse_step
from effbench.nn.files import artifact
from effbench.nn.files.checkpoint import Header, choose_storage, describe_headers, read_headers
from effbench.nn.files.load import open_run
from effbench.nn.model.linear import Storage, stored_bytes
from effbench.probes.memory import bits_per_weight

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LINEAR = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def model() -> Any:
    model = toy()
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tiny.MODEL)))
    for parameter in model.parameters():  # numbers that need more than eight bits
        parameter.data += torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    return model


def write(
    model: Any, folder: Path, says: str | None, matrices: torch.dtype, vectors: torch.dtype, **other: Any
) -> Path:
    """A checkpoint whose tensors are of these types, and whose configuration `says` another."""
    model.save_pretrained(folder)
    tensors = {
        name: other.get(name, tensor).to(matrices if tensor.ndim > 1 else vectors)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | ({} if says is None else {"dtype": says})))
    return folder


def opened(folder: Path, dtype: str | None = None) -> Any:
    settings = {"calibration_sequences": 2, "calibration_length": 16}
    return open_run(sources.model(str(folder), "tiny"), sources.data(None), "cpu", dtype, 0, settings)


@pytest.mark.parametrize(
    ("says", "matrices", "vectors", "storage", "words"),
    [
        ("bfloat16", F16, F16, F16, "F16"),
        (None, F16, F16, F16, "F16"),
        ("float32", F16, F16, F16, "F16"),
        ("float16", BF16, BF16, BF16, "BF16"),
        ("float16", BF16, F32, Storage(BF16, F32), "BF16 linears, BF16 embedding and head, F32 norms"),
        ("float16", F32, F32, BF16, "F32; matrices are measured in bfloat16"),
    ],
)
def test_the_types_are_those_of_the_tensors(
    says: str | None, matrices: torch.dtype, vectors: torch.dtype, storage: Any, words: str, model: Any, tmp_path: Path
) -> None:
    folder = write(model, tmp_path / "model", says, matrices, vectors)
    run = opened(folder)
    assert run.storage == storage and run.log.model_types == words
    for name, tensor in load_file(folder / "model.safetensors").items():
        kept = tensor if tensor.dtype != F32 or isinstance(storage, Storage) else tensor.to(BF16)
        assert torch.equal(run.model.get_parameter(name), kept.float()), name
    size = sum(p.numel() * (2 if p.ndim > 1 or storage in (BF16, F16) else 4) for p in run.model.parameters())
    assert run.original.stored_bytes == size


@pytest.mark.parametrize("vectors", [BF16, F32])
@pytest.mark.parametrize("steps", ["rtn(group_size=32)", "magnitude(sparsity=0.97)", "nf4()"])
def test_what_is_saved_has_the_types_of_the_checkpoint(
    steps: str, vectors: torch.dtype, model: Any, tmp_path: Path
) -> None:
    run = opened(write(model, tmp_path / "model", "float16", BF16, vectors))
    run.apply(parse_step(steps))
    run.finish()
    written = artifact.save(run.model, tmp_path / "out", run.storage)
    assert written == sum(stored_bytes(run.model, run.storage))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[NORM].dtype == vectors and torch.equal(tensors[NORM].float(), run.model.get_parameter(NORM))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = opened(tmp_path / "out")
    assert again.storage == run.storage and again.log.model_types == ""  # its tensors are codes
    assert all(map(torch.equal, again.model.state_dict().values(), run.model.state_dict().values()))
    plain = opened(tmp_path / "model")
    plain_bits, bits = (bits_per_weight(r.model, r.storage)[0] for r in (plain, run))
    assert bits < plain_bits == 16


def test_numbers_beyond_a_type_are_told_from_infinities_of_the_checkpoint(model: Any, tmp_path: Path) -> None:
    large = model.get_parameter(LINEAR).detach().clone()
    large[3, 5] = 7e4
    folder = write(model, tmp_path / "large", "float16", BF16, BF16, **{LINEAR: large})
    assert torch.isfinite(opened(folder).model.get_parameter(LINEAR)).all(), "whatever the configuration says"
    for dtype in ("bfloat16", "float32"):
        opened(folder, dtype)
    with pytest.raises(Refused, match=rf"{LINEAR} holds 7\.\d+e\+04, which is finite but beyond float16"):
        opened(folder, "float16")
    large[3, 5] = torch.inf
    for dtype in (None, "float16"):
        with pytest.raises(Refused, match=f"{LINEAR} holds NaN or infinity"):
            opened(write(model, tmp_path / "infinite", None, BF16, BF16, **{LINEAR: large}), dtype)
    run = opened(write(model, tmp_path / "half", None, F16, F16))
    run.model.get_parameter(LINEAR).data[0, 0] = -1e5  # what a method makes of it
    with pytest.raises(Refused, match=r"holds 1e\+05, which is finite but beyond float16 \(up to 6\.55e\+04\)"):
        run.finish()


def test_headers_of_shards(model: Any, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model.half().save_pretrained(whole)
    model.save_pretrained(parts, max_shard_size="200KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    save_file({"mask": torch.ones(9, 9)}, whole / "masks.safetensors")  # is no part of the checkpoint
    assert read_headers(whole, None) == read_headers(parts, None)
    assert choose_storage(read_headers(parts, None)) == F16
    assert read_headers(tmp_path, None) == {}


def headers(**types: str) -> dict[str, Header]:
    shapes = {"linear": "layers.0.up.weight", "embedding": "embed.weight", "norm": "norm.weight", "bias": "norm.bias"}
    sizes = {"linear": (9, 9), "embedding": (5, 9), "norm": (9,), "bias": (9,), "codes": (99, 99)}
    return {shapes.get(kind, f"layers.0.{kind}"): Header(dtype, sizes[kind]) for kind, dtype in types.items()}


@pytest.mark.parametrize(
    ("types", "storage"),
    [
        ({"linear": "BF16", "embedding": "F32"}, BF16),  # most of the numbers decide
        ({"linear": "BF16", "norm": "F16"}, BF16),
        ({"linear": "BF16", "norm": "F16", "bias": "F32"}, Storage(BF16, F32)),
        ({"linear": "F32", "norm": "F32"}, BF16),
        ({"linear": "F16", "codes": "U8"}, F16),  # codes are no weights of a type
        ({"linear": "F8_E4M3", "norm": "BF16"}, BF16),
        ({}, BF16),
    ],
)
def test_most_of_the_weights_decide(types: dict[str, str], storage: Any) -> None:
    assert choose_storage(headers(**types)) == storage


def test_types_in_words() -> None:
    assert describe_headers(headers(linear="F16", embedding="F16", norm="F16"), F16) == "F16"
    assert describe_headers(headers(linear="F16", norm="F32"), Storage(F16, F32)) == "F16 linears, F32 norms"
    assert describe_headers(headers(linear="F32", norm="F32"), BF16) == "F32; matrices are measured in bfloat16"
    mixed = headers(linear="Q4_K", embedding="Q6_K", norm="F32") | {"layers.1.up.weight": Header("Q6_K", (3, 3))}
    told = "Q4_K and Q6_K linears, Q6_K embedding and head, F32 norms; matrices are measured in float16"
    assert describe_headers(mixed, F16) == told


def test_a_dense_export_of_wide_norms_is_read_by_plain_transformers(model: Any, tmp_path: Path) -> None:
    run = opened(write(model, tmp_path / "model", None, BF16, F32))
    artifact.save_dense(run.model, tmp_path / "out", run.storage)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=F32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, run.model(ids).logits)
