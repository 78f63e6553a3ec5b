"""What is extracted is nearest to the question, by brute force."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from effbench import tiny
from effbench.core.errors import Unsupported, Usage
from effbench.core.views import Segments
from effbench.methods.prompt import _units
from effbench.methods.prompt.extractive import Extractive
from effbench.methods.prompt.retrieval import Retrieval
from effbench.nn.kinds.prompt import rewrite
from effbench.nn.run import ModelRun

NEEDLES = [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / "needle_256.jsonl").open()][:3]


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).eval()


def find_nearness(model: Any, tokenizer: Any, sentences: list[str], question: str) -> list[float]:
    """Cosines of mean last states, each text read by itself."""

    def embed(text: str) -> torch.Tensor:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(ids, output_hidden_states=True).hidden_states[-1][0].double().mean(0)

    asked = embed(question)
    return [float(torch.cosine_similarity(embed(text), asked, 0)) for text in sentences]


@pytest.mark.parametrize("number", range(len(NEEDLES)))
def test_the_nearest_sentences_stay(
    number: int, run: ModelRun, model: Any, of_contexts: Callable[[Segments, float], float]
) -> None:
    """Every set of eight sentences is tried. Of those that have room, the one that comes first when sets are compared
    best sentence first is kept, and the smallest of the rest, if the budget is then missed by less."""
    row = NEEDLES[number]
    sentences = [text + ". " for text in row["context"].rstrip(".").split(". ")][:8]
    prompt = Segments("", "Notes: ", ("".join(sentences),), row["question"])
    near = find_nearness(model, run.tokenizer, sentences, row["question"])
    sizes = [len(run.tokenizer(" " + text.rstrip(), add_special_tokens=False)["input_ids"]) for text in sentences]
    for share in (0.2, 0.45, 0.7):
        room = int(share * sum(sizes))
        sets = [some for size in range(1, 9) for some in combinations(range(8), size)]
        fit = [some for some in sets if sum(sizes[i] for i in some) <= room]
        best = [*max(fit, key=lambda some: sorted((near[i] for i in some), reverse=True))]
        left = room - sum(sizes[i] for i in best)
        small = min(set(range(8)) - {*best}, key=lambda i: (sizes[i], -near[i]))
        best += [small] if sizes[small] - left < left else []
        new = Extractive(keep=of_contexts(prompt, share)).rewrite(prompt, run)
        assert "".join(new.contexts).split() == "".join(sentences[i] for i in sorted(best)).split()
        assert (new.instruction, new.question) == ("Notes: ", row["question"])


def test_sentences_of_several_contexts_are_ranked_together(run: ModelRun, model: Any) -> None:
    row = NEEDLES[0]
    sentences = [text + ". " for text in row["context"].rstrip(".").split(". ")][:6]
    prompt = Segments("", "Notes: ", ("".join(sentences[:2]), "".join(sentences[2:])), row["question"])
    near = find_nearness(model, run.tokenizer, sentences, row["question"])
    kept = "".join(Extractive(keep=0.4).rewrite(prompt, run).contexts)
    assert sentences[near.index(max(near))].strip() in kept
    assert [text for text in sentences if text.strip() in kept][-1].strip() in kept[-60:]  # in their order


def test_retrieval_by_embeddings_ranks_alike(run: ModelRun) -> None:
    row = NEEDLES[1]
    prompt = Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)
    assert Retrieval(by="model").rewrite(prompt, run) == Extractive().rewrite(prompt, run)
    assert Retrieval(by="model").rewrite(prompt, run) != Retrieval().rewrite(prompt, run)


def test_phrases(
    run: ModelRun, monkeypatch: pytest.MonkeyPatch, of_contexts: Callable[[Segments, float], float]
) -> None:
    """Phrases stay and go by themselves; the one that is the question is the nearest."""
    monkeypatch.setattr(_units, "split_phrases", lambda text: [f"{part} " for part in text.strip().split(" | ")])
    prompt = Segments("", "Notes: ", ("The rope | fell | The code krox | in the hall ",), "The code krox")
    kept = Extractive(unit="phrase", keep=of_contexts(prompt, 0.5)).rewrite(prompt, run).contexts[0]
    assert "The code krox" in kept and "in the hall" not in kept


def test_prompts_and_settings_that_it_cannot_take(run: ModelRun) -> None:
    with pytest.raises(Unsupported, match="reads the question"):
        rewrite(run, Extractive(), Segments(contexts=("The code krox",), whole=True))
    bare = Segments(question="The code krox")
    assert Extractive().rewrite(bare, run) == bare
    for settings in ({"unit": "word"}, {"keep": 0.0}):
        with pytest.raises(Usage):
            Extractive(**settings)
