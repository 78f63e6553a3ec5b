"""Models and texts that cannot be used are outcomes with a reason, never tracebacks and never wrong numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from effbench import sources, tiny
from effbench.checks import TOYS, toy
from effbench.core.errors import Refused, Unsupported
from effbench.nn.files.load import open_run
from effbench.nn.infer.engine import open_engine

SETTINGS = {"calibration_sequences": 2, "calibration_length": 32}


def opened(model: Path | str, data: str | None = None, tokenizer: str | None = "tiny"):
    return open_run(sources.model(str(model), tokenizer), sources.data(data), "cpu", None, 0, SETTINGS)


@pytest.fixture
def folder(tmp_path):
    """A random Llama whose vocabulary fits the tokenizer that ships."""
    model = toy()
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tiny.MODEL)))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_local_folders_run(tmp_path, architecture):
    model = toy(architecture)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tiny.MODEL)))
    model.save_pretrained(tmp_path / architecture)
    run = opened(tmp_path / architecture)
    from effbench.core.recipe import parse_step

    run.apply(parse_step("rtn()"))
    run.finish()
    assert torch.isfinite(open_engine(run).logits(run.data.heldout_ids(32)[None])).all()
    assert len(run.log.layers) == {"llama": 14, "opt": 12, "gpt2": 8}[architecture]


def test_the_model_that_ships_opens_and_has_tasks():
    run = opened("tiny", tokenizer=None)
    assert run.data.tasks == ("tiny",) and run.storage == torch.bfloat16
    assert len(run.calibration()) == 2


def test_a_pickle_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(Refused, match=r"pytorch_model\.bin is a pickle"):
        opened(folder)


def test_a_damaged_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(Unsupported, match="is no whole safetensors file"):
        opened(folder)


def test_weights_that_are_not_numbers(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, name, torch.full((256, 128), torch.nan))
    with pytest.raises(Refused, match=rf"{name} holds NaN"):
        opened(folder)


def test_a_missing_tensor(folder):
    change(folder, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(Unsupported, match=r"1 missing keys, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        opened(folder)


def test_a_tensor_of_another_shape(folder):
    change(folder, "model.layers.1.mlp.up_proj.weight", torch.zeros(8, 8))
    message = r"up_proj\.weight is \[8, 8\], the configuration asks for \[256, 128\]"
    with pytest.raises(Unsupported, match=message):
        opened(folder)


def test_no_tokenizer(folder):
    run = opened(folder, tokenizer=None)
    with pytest.raises(Unsupported, match="no tokenizer"):
        run.calibration()


def test_a_tokenizer_of_another_model(tmp_path):
    toy().save_pretrained(tmp_path / "model")
    with pytest.raises(Unsupported, match="do not belong together"):
        opened(tmp_path / "model")


def test_an_unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="'bert' is not one of"):
        opened(folder)


def test_a_text_too_short_for_a_window_is_unsupported(folder, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "b.txt").write_text("Too short.")
    with pytest.raises(Unsupported, match=r"a window needs 32: .*calibration_length=.*calibration_sequences="):
        opened(folder, f"text:{texts}").calibration()


@pytest.mark.parametrize("length", [1025, 4096])
def test_calibration_sequences_longer_than_the_positions_are_unsupported(folder, length):
    with pytest.raises(Unsupported, match=f"calibration_length is {length} tokens, the model has"):
        open_run(sources.model(str(folder)), sources.data(None), "cpu", None, 0, {"calibration_length": length})


def test_random_weights_have_no_quality(monkeypatch):
    from effbench.sources import shapes

    small = dict(shapes.SHAPES["gpt2"], n_layer=2, n_embd=128, n_head=4, vocab_size=500)
    monkeypatch.setitem(shapes.SHAPES, "small", small)
    run = opened("shape:small", tokenizer=None)
    assert len(run.calibration()) == 2
    with pytest.raises(Refused, match="random"):
        run.data.heldout_ids()


def test_all_shapes_are_of_known_architectures():
    from effbench.nn.model.blocks import ARCHITECTURES
    from effbench.sources.shapes import SHAPES

    assert {shape["model_type"] for shape in SHAPES.values()} <= ARCHITECTURES.keys()
    assert set(TOYS) == set(ARCHITECTURES)


def test_a_saved_compressed_model_opens_as_a_folder(tmp_path, folder):
    from effbench.core.recipe import parse_step
    from effbench.nn.files import artifact

    run = opened(folder)
    run.apply(parse_step("nf4(double_quant=True)"))
    run.finish()
    artifact.save(run.model, tmp_path / "saved", run.storage)
    again = opened(tmp_path / "saved")
    ids = run.data.heldout_ids(32)[None]
    assert torch.equal(open_engine(again).logits(ids), open_engine(run).logits(ids))
    shutil.rmtree(tmp_path / "saved")
