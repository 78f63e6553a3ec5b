"""Folders made by somebody else: whatever their files hold, opening one is an outcome with a reason."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from effbench import sources, tiny
from effbench.checks import toy, toy_run
from effbench.core.errors import Outcome, Refused, Unsupported
from effbench.core.recipe import parse
from effbench.nn.files import artifact
from effbench.nn.files.load import open_run

FORMATS = (
    "rtn(group_size=32)",
    "magnitude(pattern='2:4')",
    "magnitude(sparsity=0.6)",
    "nf4()",
    "slicegpt(slicing=0.25)",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One artifact of each format."""
    folders = {}
    for steps in FORMATS:
        run = toy_run("llama")
        for step in parse(steps).steps:
            run.apply(step)
        run.finish()
        folders[steps] = tmp_path_factory.mktemp("saved")
        artifact.save(run.model, folders[steps], run.storage)
    return folders


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of an artifact with integer codes, to be damaged."""
    shutil.copytree(saved[FORMATS[0]], tmp_path / "model")
    return tmp_path / "model"


def manifest(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / artifact.MANIFEST).read_text())
    return body


def write(folder: Path, body: Any) -> None:
    (folder / artifact.MANIFEST).write_text(body if isinstance(body, str) else json.dumps(body))


FIRST = "model.layers.0.mlp.down_proj"


def changed(body: dict[str, Any], **entry: Any) -> dict[str, Any]:
    return body | {"changed": body["changed"] | {"model.layers.0.mlp": entry}}


def replaced(body: dict[str, Any], **entry: Any) -> dict[str, Any]:
    return body | {"replaced": body["replaced"] | {FIRST: body["replaced"][FIRST] | entry}}


def with_config(body: dict[str, Any], **config: Any) -> dict[str, Any]:
    return replaced(body, config=body["replaced"][FIRST]["config"] | config)


HOSTILE = {
    "no JSON": (lambda body: "{", "malformed|truncated"),
    "a list": (lambda body: [], "Expected `object`"),
    "no keys": (lambda body: {}, "missing required field"),
    "another version": (lambda body: body | {"version": 2}, "version"),
    "unknown keys": (lambda body: body | {"more": 1}, "unknown field `more`"),
    "nested deeply": (lambda body: "[" * 100_000, "recursion|Expected"),
    "a foreign module": (lambda body: replaced(body, **{"class": "antigravity:Linear"}), "no class of effbench"),
    "a function": (lambda body: replaced(body, **{"class": "os:system"}), "no class of effbench"),
    "a class of torch": (lambda body: replaced(body, **{"class": "torch.nn.modules.linear:Bilinear"}), "no class of"),
    "a module of ours": (lambda body: replaced(body, **{"class": "effbench.nn.files.load:open_run"}), "no class of"),
    "a class of ours": (lambda body: replaced(body, **{"class": "effbench.nn.run:ModelRun"}), "no module of a model"),
    "a name in a name": (lambda body: replaced(body, **{"class": "effbench.nn.run:ModelRun.x"}), "no class of"),
    "a list for a class": (lambda body: replaced(body, **{"class": ["a"]}), "Expected `str`"),
    "another block's class": (lambda body: changed(body, **{"class": "effbench.formats.integer:IntLinear"}), "is no"),
    "negative sizes": (lambda body: with_config(body, in_features=-1), "cannot be built"),
    "absurd sizes": (lambda body: with_config(body, in_features=2**60, out_features=2**60), "cannot be built"),
    "large sizes": (lambda body: with_config(body, out_features=2**40), "expected"),
    "no groups": (lambda body: with_config(body, group_size=0), "cannot be built"),
    "text for sizes": (lambda body: with_config(body, in_features="128"), "cannot be built"),
    "unknown arguments": (lambda body: with_config(body, device="cuda"), "cannot be built"),
    "nested arguments": (lambda body: with_config(body, base={"a": 1}), "Expected"),
    "negative shapes": (lambda body: changed(body, shapes={"weight": [-1]}), "Expected `int` >= 0"),
    "absurd shapes": (lambda body: changed(body, shapes={"weight": [2**40, 2**40]}), "cannot be built"),
    "large shapes": (lambda body: changed(body, shapes={"weight": [2**40]}), "missing"),
    "a shape of no tensor": (lambda body: changed(body, shapes={"forward": [1]}), "is no tensor"),
    "a dotted name": (lambda body: changed(body, shapes={"a.b": [1]}), "cannot be built"),
    "an attribute that is a function": (lambda body: changed(body, attributes={"forward": 1}), "is no number"),
    "a private attribute": (lambda body: changed(body, attributes={"_modules": 1}), "is no number"),
    "an attribute of text": (lambda body: changed(body, attributes={"hidden_size": "a"}), "Expected"),
    "no such path": (lambda body: body | {"changed": {"model.layers.9.mlp": {}}}, "describes no model.layers.9.mlp"),
    "an empty path": (lambda body: body | {"replaced": {"": body["replaced"][FIRST]}}, "cannot be built"),
    "tied without a partner": (lambda body: body | {"tied": {f"{FIRST}.scale": "lm_head.weight"}}, "is not tied"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests(folder: Path, name: str) -> None:
    """Refused with one line, before memory is taken and without importing what they name."""
    change, words = HOSTILE[name]
    write(folder, change(manifest(folder)))
    with pytest.raises(Unsupported, match=words) as error:
        artifact.load(folder)
    assert "\n" not in str(error.value)
    assert "antigravity" not in sys.modules


def test_the_classes_that_a_manifest_may_name_are_those_of_the_source(saved: dict[str, Path]) -> None:
    for folder in saved.values():
        body = manifest(folder)
        named = {entry.get("class") for part in ("replaced", "changed") for entry in body[part].values()}
        assert named - {None} <= artifact.buildable() | {artifact.LINEAR}
    assert not any(name.startswith(("os", "torch", "effbench.cli")) for name in artifact.buildable())


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2, 3, 8, 128, 256, 2**31])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(sorted(artifact.buildable())),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every place in a nested value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths(value[key], (*path, key))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_manifest_is_loaded_or_an_outcome(saved: dict[str, Path], data: st.DataObject) -> None:
    folder = saved[data.draw(st.sampled_from(FORMATS))]
    text = (folder / artifact.MANIFEST).read_text()
    body = json.loads(text)
    *path, last = data.draw(st.sampled_from([place for place in paths(body) if place]))
    inner = body
    for key in path:
        inner = inner[key]
    inner[last] = data.draw(ANYTHING)
    write(folder, body)
    try:
        model = artifact.load(folder)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    except Outcome as error:
        assert str(error) and "\n" not in str(error)
    finally:
        write(folder, text)


def test_tensors_that_are_no_numbers(folder: Path) -> None:
    path = folder / artifact.WEIGHTS
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if name.endswith(".scale"))
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, path)
    with pytest.raises(Refused, match=f"{name} holds NaN"):
        artifact.load(folder)
    save_file(tensors | {name: tensors[name].to(torch.int32)}, path)
    with pytest.raises(Unsupported, match=r"holds torch\.int32, expected torch\.float16"):
        artifact.load(folder)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(Unsupported, match="cannot be built"):
        artifact.load(folder)
    path.unlink()
    with pytest.raises(Unsupported, match="cannot be built"):
        artifact.load(folder)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """An ordinary checkpoint whose vocabulary fits the tokenizer that ships."""
    model = toy()
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tiny.MODEL)))
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def opened(folder: Path, tokenizer: str | None = "tiny") -> Any:
    source = sources.model(str(folder), tokenizer)
    return open_run(source, sources.data(None), "cpu", None, 0, {"calibration_sequences": 2, "calibration_length": 32})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_position_embeddings", 0),
        ("max_position_embeddings", -1),
        ("max_position_embeddings", 2**40),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("hidden_size", -8),
        ("vocab_size", 0),
    ],
)
def test_absurd_configurations(plain: Path, name: str, value: int) -> None:
    path = plain / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(Unsupported, match=rf"{name} is {value}, must be from 1 to|config\.json cannot be read"):
        opened(plain)


def test_a_token_beyond_the_table(plain: Path) -> None:
    """The tokenizer is no longer than the table, and yet one of its tokens is."""
    for file in tiny.MODEL.glob("*token*"):
        shutil.copy(file, plain)
    path = plain / "tokenizer.json"
    body = json.loads(path.read_text())
    vocabulary = body["model"]["vocab"]
    word = max(vocabulary, key=vocabulary.get)
    vocabulary[word] = 10**6
    path.write_text(json.dumps(body))
    with pytest.raises(Unsupported, match=r"tokens up to 1000000, .* do not belong together"):
        opened(plain, tokenizer=None)
