"""LLMLingua-2: labels by hand, the selection in closed form, and a classifier that learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effbench import sources, tiny
from effbench.checks import toy_run
from effbench.core.errors import Usage
from effbench.core.recipe import parse
from effbench.core.views import Segments
from effbench.methods.prompt._common import Piece, open_judge
from effbench.methods.prompt._labels import (
    align,
    align_compressions,
    classify,
    cut_words,
    list_texts,
    make_classifier,
    try_removals,
    write_compression,
)
from effbench.methods.prompt.llmlingua2 import LLMLingua2, select
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun

NEEDLES = [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / "needle_256.jsonl").open()][:6]
QUICK: dict[str, Any] = {"steps": 12, "texts": 16, "batch_size": 4, "lr": 1e-3, "length": 64}


def say(word: list[Piece]) -> str:
    return "".join(piece.text for piece in word)


@pytest.fixture(scope="module")
def trained() -> tuple[ModelRun, LLMLingua2]:
    settings = {"calibration_sequences": 2, "calibration_length": 32}
    run = open_run(sources.model("tiny", None), sources.data(None), "cpu", "float32", 0, settings)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    method = LLMLingua2(**QUICK)
    run.apply(method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert not run.log.fits and run.train.empty  # what it trained leaves no trace
    return run, method


def write(row: dict[str, Any]) -> Segments:
    return Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)


# Selection


def select_by_numpy(worth: list[float], sizes: list[int], keep: float) -> list[bool]:
    """As the authors' `__compress` has it."""
    spread = [value for value, size in zip(worth, sizes, strict=True) for _ in range(size)]
    threshold = np.percentile(spread, int(100 * (1 - keep) + 1))
    return [bool(value > threshold or (threshold == 1.0 and value == threshold)) for value in worth]


@pytest.mark.parametrize("keep", [0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_words_above_a_percentile_of_their_tokens_stay(keep: float, seed: int) -> None:
    chance = np.random.default_rng(seed)
    worth, sizes = chance.random(60).tolist(), chance.integers(1, 4, 60).tolist()
    worth[3] = worth[7] = 1.0
    assert select(worth, sizes, keep) == select_by_numpy(worth, sizes, keep)


def test_the_rate_is_that_of_tokens_and_not_half_a_probability() -> None:
    worth = [0.01 * i for i in range(10)]  # none above a half
    assert select(worth, [1] * 10, 0.5) == [False] * 5 + [True] * 5
    assert select(worth, [1] * 9 + [10], 0.4) == [False] * 10  # more than the share that may stay is the last word's
    assert select([1.0] * 4, [1] * 4, 0.1) == [True] * 4


def test_a_word_is_worth_the_mean_of_its_tokens(
    trained: tuple[ModelRun, LLMLingua2],
    monkeypatch: pytest.MonkeyPatch,
    of_contexts: Callable[[Segments, float], float],
) -> None:
    run, method = trained
    prompt = Segments(contexts=(" the rope fell in the hall and the coin fell in the tower ",), question="what")
    ids = run.tokenizer(prompt.contexts[0].rstrip(), add_special_tokens=False)["input_ids"]
    told = {run.tokenizer.decode([token]): i / 100 for i, token in enumerate(dict.fromkeys(ids))}
    monkeypatch.setattr(
        "effbench.methods.prompt.llmlingua2.classify",
        lambda model, tokens: [told.get(run.tokenizer.decode([token]), 0.0) for token in tokens],
    )
    monkeypatch.setattr(LLMLingua2, "_find_classifier", lambda self, run: None)
    words = prompt.contexts[0].split()
    worth = {word: told[" " + word] for word in words}  # each is one token
    stays = select_by_numpy([worth[word] for word in words], [1] * len(words), 0.5)
    kept = [word for word, stay in zip(words, stays, strict=True) if stay]
    share = of_contexts(prompt, 0.5)
    assert share > 0.5
    for settings in ({"keep": share}, {"of": "contexts"}):
        new = replace(method, **settings).rewrite(prompt, run)
        assert new.contexts[0].split() == kept and new.question == prompt.question


# Labels


def test_words_begin_with_white_space_and_marks() -> None:
    texts = ["The", " key", "board", ",", " it", "'", "s", "\n", "Two"]
    pieces = [Piece(text, (i,), 0, False, i) for i, text in enumerate(texts)]
    assert [say(word) for word in cut_words(pieces)] == ["The", " keyboard", ",", " it", "'s", "\nTwo"]


def test_alignment_by_hand() -> None:
    original = ["the", "rope", "fell", "in", "the", "hall", "and", "the", "coin", "fell", "in", "the", "tower"]

    def labels(text: str, searched: int = 150) -> list[int]:
        return [i for i, found in enumerate(align(original, text.split(), searched)) if found]

    assert labels("rope fell hall coin fell tower") == [1, 2, 5, 8, 9, 12]  # each `fell` the one behind its noun
    assert labels("coin fell rope") == [1, 8, 9]  # it is looked for behind, too
    assert labels("The HALL") == [0, 5]
    assert labels("rope tower", 4) == [1]  # not within the window
    assert labels("mountain coin") == [8]
    assert labels("fell fell fell") == [2, 9]


def test_compressions_are_of_what_the_model_expects_least(run: ModelRun) -> None:
    judge = open_judge(run, "reference")
    texts = [*list_texts(run, judge, 20, 64)]
    assert len(texts) == 20 and all(sum(len(piece.ids) for word in words for piece in word) <= 64 for words in texts)
    labels = align_compressions(judge, texts)
    assert sum(not row for row in labels) == 2  # the tenth that is aligned worst
    for words, row in zip(texts, labels, strict=True):
        if row:
            compression = write_compression(judge, words)
            assert sum(row) == len(compression) < len(row)
            found = [say(word).strip().lower() for word, stays in zip(words, row, strict=True) if stays]
            assert sorted(found) == sorted(word.strip().lower() for word in compression)


def test_labels_by_what_removing_a_word_changes(run: ModelRun) -> None:
    judge = open_judge(run, "reference")
    (words,) = list_texts(run, judge, 1, 48)
    (labels,) = try_removals(judge, [words])
    ids = [[token for piece in word for token in piece.ids] for word in words]
    (said,) = judge.engine.generate([[judge.first, *(token for word in ids for token in word)]], 4, set())
    for i, label in enumerate(labels):
        rest = [judge.first, *(token for j, word in enumerate(ids) if j != i for token in word)]
        assert label == (judge.engine.generate([rest], 4, set()) != [said])
    assert any(labels)


# The classifier


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_the_classifier_reads_in_both_directions(architecture: str) -> None:
    run = toy_run(architecture)
    model = make_classifier(run.model, 0).eval()
    ids = [*range(5, 25)]
    first, other = classify(model, ids), classify(model, [*ids[:-1], 60])
    assert len(first) == 20 and all(0 < value < 1 for value in first)
    assert abs(first[0] - other[0]) > 1e-7
    assert run.model.get_output_embeddings().weight.shape[0] > 2  # the model keeps its own head


def test_it_learns_its_labels(trained: tuple[ModelRun, LLMLingua2]) -> None:
    run, method = trained
    note = run.log.notes[method.label]
    assert note["loss_last"] < 0.9 * note["loss_first"] and note["texts"] >= 14 and 0.3 < note["kept"] < 0.6


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_the_prompt_meets_its_budget(keep: float, trained: tuple[ModelRun, LLMLingua2]) -> None:
    """Of a step whose `keep` is another one, as a bound makes it, the classifier is the same."""
    run, _ = trained
    method = LLMLingua2(keep=keep, **QUICK)
    before = after = 0
    for row in NEEDLES:
        prompt = write(row)
        before += len(run.tokenizer(prompt.text())["input_ids"])
        after += len(run.tokenizer(method.rewrite(prompt, run).text())["input_ids"])
    assert after / before == pytest.approx(keep, abs=0.05)


def test_long_texts_are_classified_in_chunks(trained: tuple[ModelRun, LLMLingua2]) -> None:
    run, method = trained
    text = " ".join(row["context"] for row in NEEDLES[:3])
    prompt = Segments(contexts=(text + " ",), question=NEEDLES[0]["question"])
    new = method.rewrite(prompt, run)
    assert run.log.notes["chunks"]["llmlingua2"] == 2
    halves = [new.text()[: len(new.text()) // 2], new.text()[len(new.text()) // 2 :]]
    assert all(len(half.split()) > 50 for half in halves)


def test_a_step_is_remembered_with_its_classifier(trained: tuple[ModelRun, LLMLingua2]) -> None:
    run, _ = trained
    prompt = write(NEEDLES[0])
    short = run.rewrite(prompt)
    with run.aside("other"):
        pass
    assert run.rewrite(prompt) == short != prompt
    assert parse("llmlingua2(compressor='none')").steps[0].reads == {"none": set()}


@pytest.mark.parametrize("settings", [{"steps": 0}, {"texts": 0}, {"length": 1}, {"lr": 0.0}, {"keep": 0.0}])
def test_settings_that_mean_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        LLMLingua2(**settings)
