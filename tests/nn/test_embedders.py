"""Texts as vectors: what they are, and that nothing of a long text is cut off."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from effbench import tiny
from effbench.checks import toy_run
from effbench.core.errors import Unsupported
from effbench.nn.embedders import cut_text, embed_texts

TOKENIZER = AutoTokenizer.from_pretrained(tiny.MODEL)
TEXT = "The old parrot ate some seeds in the kitchen. The code zisk gloxi. "


def count(text: str) -> int:
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("abz .\n漢😀é"), max_size=60), st.integers(1, 12))
def test_slices_are_the_text_and_fit(text: str, window: int) -> None:
    parts = cut_text(text, TOKENIZER, window)
    assert "".join("".join(parts).split()) == "".join(text.split())
    longest = max((count(word) for word in text.split()), default=0)
    if longest < window:  # with the white space in front of it
        assert all(count(part.strip()) <= window for part in parts)


def test_texts_are_cut_between_words() -> None:
    parts = cut_text(TEXT * 20, TOKENIZER, 25)
    assert "".join(parts) == TEXT * 20 and len(parts) > 10
    assert [word for part in parts for word in part.split()] == (TEXT * 20).split()
    assert all(20 <= count(part) <= 25 for part in parts[:-1])
    assert cut_text(TEXT, TOKENIZER, count(TEXT)) == [TEXT] and cut_text(" \n", TOKENIZER, 4) == []
    assert max(map(count, cut_text("zisk" * 100, TOKENIZER, 10))) <= 10
    with pytest.raises(Unsupported, match="fast tokenizer"):
        cut_text(TEXT, SimpleNamespace(is_fast=False), 10)


class Told:
    """Stands for a run."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.kept: dict[Any, Any] = {}

    def share(self, key: Any, compute: Any) -> Any:
        return self.kept[key] if key in self.kept else self.kept.setdefault(key, compute())


class Letters:
    """A model of sentence-transformers that counts letters, and reads 10 tokens and one at either end."""

    max_seq_length = 12
    opened = 0
    read: list[str] = []

    def __init__(self, name: str, device: str) -> None:
        Letters.opened += 1
        self.tokenizer = Special()

    def encode(self, texts: Sequence[str], **options: Any) -> torch.Tensor:
        Letters.read += texts
        return torch.tensor([[text.count(letter) + 0.5 for letter in "aeio"] for text in texts])


class Special:
    """The tokenizer, with two special tokens."""

    is_fast = True

    def __call__(self, *args: Any, **options: Any) -> Any:
        return TOKENIZER(*args, **options)

    def num_special_tokens_to_add(self) -> int:
        return 2


def test_long_texts_have_several_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Letters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    monkeypatch.setattr(Letters, "read", [])
    run: Any = Told()
    texts = ["The code zisk", TEXT * 3, " ", "seeds"]
    vectors, owners = embed_texts(run, texts, "some-encoder")
    parts = {i: cut_text(text, TOKENIZER, 10) for i, text in enumerate(texts)}
    assert owners.tolist() == [i for i, own in parts.items() for _ in own] and len(parts[1]) > 3 and not parts[2]
    assert all(count(text) <= 10 for text in Letters.read) and len(Letters.read) == len(owners)
    for vector, part in zip(vectors, [part for own in parts.values() for part in own], strict=True):
        counted = torch.tensor([part.count(letter) + 0.5 for letter in "aeio"])
        assert torch.allclose(vector, counted / counted.norm())
    embed_texts(run, texts, "some-encoder")
    assert Letters.opened == 1  # once in a run
    assert len(embed_texts(run, ["", " "], "some-encoder").owners) == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox"])
def test_own_states_are_means_of_each_chunk(architecture: str) -> None:
    run = toy_run(architecture)
    words = "One two three . Four five six . What is next"
    longest = run.reference.config.max_position_embeddings
    texts = [words, "far from it", " ".join([words] * (longest // 8))]
    vectors, owners = embed_texts(run, texts, "model")
    assert owners.tolist()[:2] == [0, 1] and owners.tolist().count(2) > 1
    chunks = [*texts[:2], *cut_text(texts[2], run.tokenizer, longest)]
    for vector, chunk in zip(vectors, chunks, strict=True):
        ids = run.tokenizer(chunk, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert ids.shape[1] <= longest
        with torch.no_grad():  # each by itself: no padding
            states = run.reference(ids, output_hidden_states=True).hidden_states[-1][0].float()
        assert torch.allclose(vector, states.mean(0) / states.mean(0).norm(), atol=1e-5)
