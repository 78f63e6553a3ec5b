"""Models and data sets of the Hub: the real loading code, on a cache laid out as its client lays it out."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from effbench import sources, tiny
from effbench.core.errors import Unsupported, Usage
from effbench.nn.data import open_data
from effbench.nn.files.load import find_folder, open_run

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds org/toy in two revisions, whose weights differ; no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path), raising=False)
    folder = tmp_path / "models--org--toy"
    (folder / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate(COMMITS.items()):
        (folder / "refs" / name).write_text(commit)
        model = AutoModelForCausalLM.from_pretrained(tiny.MODEL)
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = seed
        snapshot = folder / "snapshots" / commit
        model.save_pretrained(snapshot)
        AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained(snapshot)
    return tmp_path


def weight(name: str) -> tuple[torch.Tensor, str]:
    run = open_run(sources.model(name), sources.data(None), "cpu", None, 0)
    found: torch.Tensor = run.model.model.layers[0].mlp.up_proj.weight
    return found, run.log.commit


def test_a_revision_is_what_is_opened_and_recorded(hub: Path) -> None:
    first, commit = weight("org/toy")
    assert commit == COMMITS["main"]
    second, commit = weight("org/toy@v2")
    assert commit == COMMITS["v2"] and not torch.equal(first, second)
    third, commit = weight(f"org/toy@{COMMITS['v2']}")
    assert commit == COMMITS["v2"] and torch.equal(second, third)


def test_files_beside_the_tensors_are_found(hub: Path) -> None:
    source = sources.model("org/toy@v2")
    folder = find_folder(source)
    assert folder is not None and folder.name == COMMITS["v2"] and (folder / "tokenizer.json").is_file()
    named = sources.model("org/toy@v2", "tiny")
    assert named.location == "org/toy" and named.name == "org/toy@v2 with tokenizer tiny"


def test_only_a_commit_is_a_digest() -> None:
    assert sources.model("org/toy").digest == sources.model("org/toy@v2").digest == sources.UNRESOLVED
    assert sources.model(f"org/toy@{COMMITS['v2']}").digest != sources.UNRESOLVED
    with pytest.raises(Usage, match="org/name@REVISION"):
        sources.model("org/toy@")


@pytest.mark.parametrize("name", ["org/absent", "org/toy@v3"])
def test_what_is_not_there_is_an_outcome(hub: Path, name: str) -> None:
    with pytest.raises(Unsupported, match=r"config\.json cannot be read"):
        weight(name)


def test_a_data_set_gives_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "corpora" / "small"
    folder.mkdir(parents=True)
    for split, texts in {"train": ["one", "two", "three", " "], "test": ["four"]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = open_data(sources.data("hub:corpora/small"), AutoTokenizer.from_pretrained(tiny.MODEL), length=4)
    assert data.documents("train") == ["two", "three"]
    assert (
        data.documents("calibration") == ["one", "two", "three"] and "filled up with the training part" in data.protocol
    )
    assert data.documents("heldout") == ["four"]
    (folder / "test.jsonl").unlink()
    with pytest.raises(Unsupported, match="no test or validation split"):
        open_data(sources.data("hub:corpora/small"), None)
