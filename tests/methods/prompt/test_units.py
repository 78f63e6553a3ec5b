"""Sentences and phrases are slices of the text, and what stays has room."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from effbench.core.errors import Refused
from effbench.core.views import Segments
from effbench.methods.prompt import _units
from effbench.methods.prompt._units import Unit, compare, cut_units, join_units, keep_best, split_phrases
from effbench.methods.prompt.extractive import Extractive
from effbench.nn.embedders import Chunks
from effbench.nn.run import ModelRun

TAGS = {
    "The": "AT0", "the": "AT0", "a": "AT0", "my": "DPS", "two": "CRD", "1,999": "CRD", "very": "AV0", "often": "AV0",
    "old": "AJ0", "happy": "AJ0", "broken": "VVN", "eating": "VVG", "parrot": "NN1", "apples": "NN2", "doctor": "NN1",
    "kitchen": "NN1", "friend": "NN1", "Lincoln": "NP0", "'s": "POS", "ate": "VVD", "was": "VBD", "in": "PRP",
    "He": "PNP", "did": "VDD", "n't": "XX0", "it": "PNP",
}  # fmt: skip


@pytest.fixture
def tagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags as HanTa gives them, without the package."""
    tag = lambda words: [(word, word, TAGS.get(word, "UNC")) for word in words]  # noqa: E731
    monkeypatch.setattr(_units, "_open_tagger", lambda: SimpleNamespace(tag_sent=tag))


@pytest.mark.usefixtures("tagged")
@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("The very old parrot ate two apples.", ["The very old parrot", " ate", " two apples", "."]),
        ("He was eating apples often.", ["He", " was", " eating", " apples", " often", "."]),
        ("my doctor’s broken kitchen\n(the friend)", ["my doctor’s broken kitchen", "\n(", "the friend", ")"]),
        ("Lincoln's friend did it in 1,999 old apples",
         ["Lincoln's friend", " did", " it", " in", " 1,999 old apples"]),
        ("He didn't. The old. apples  ", ["He", " did", "n't", ".", " The", " old", ".", " apples  "]),
        ("... !", [".", ".", ".", " !"]),
        ("  ", ["  "]),
        ("", []),
    ],
)  # fmt: skip
def test_phrases_end_with_their_noun(text: str, phrases: list[str]) -> None:
    assert split_phrases(text) == phrases and "".join(phrases) == text


def test_phrases_by_the_tagger_itself() -> None:
    text = "The broken lamp of my father’s friend fell, but we didn't form a more perfect Union in 1999."
    phrases = [phrase.strip() for phrase in split_phrases(text)]
    assert "".join(split_phrases(text)) == text
    assert [phrase for phrase in phrases if " " in phrase] == [
        "The broken lamp", "my father’s friend", "a more perfect Union",
    ]  # fmt: skip


WORDS = ("fog ", "mole code ", "rope hall coin ", "tower ")
PROMPT = Segments("", "Notes: ", WORDS, "The code")
UNITS = cut_units(PROMPT, "context")


def keep(share: float, scores: list[float], run: ModelRun, **options: Any) -> tuple[str, ...]:
    """Where a share of the 7 tokens of the contexts has room beside the 4 of all else."""
    return keep_best(Extractive(keep=(4 + 7 * share) / 11), PROMPT, run.tokenizer, UNITS, scores, **options).contexts


def test_the_best_that_have_room_stay_in_their_order(run: ModelRun) -> None:
    """1, 2, 3 and 1 of 7 tokens."""
    scores = [0.1, 0.3, 0.4, 0.3]
    assert keep(3 / 7, scores, run) == (WORDS[2],)
    assert keep(4 / 7, scores, run) == (WORDS[2], WORDS[3])  # two would be too many, what is behind has room
    assert keep(5 / 7, scores, run) == WORDS[1:3]
    assert keep(2 / 7, scores, run) == (WORDS[1],)  # the best has no room
    assert keep(2 / 7, [1.0] * 4, run) == (WORDS[0], WORDS[3])
    assert keep(3 / 7, scores, run, forced={0}) == (WORDS[0], WORDS[1])
    assert keep(1 / 7, scores, run, forced={0, 2}) == (WORDS[0], WORDS[2])


def test_the_smallest_of_the_rest_stays_if_the_budget_is_missed_by_less(run: ModelRun) -> None:
    """5, 7 and 4 of 16 tokens."""
    words = ("fog mole code rope hall ", "coin tower parrot seeds kitchen glove judge ", "attic winter drummer stage ")
    prompt, scores = Segments("", "Notes: ", words, "The code"), [0.1, 0.3, 0.2]
    for budget, kept in ((7, [1]), (9, [1]), (10, [1, 2]), (13, [1, 2]), (14, [0, 1, 2]), (3, [2]), (2, None)):
        method = Extractive(keep=(4 + budget) / 20)
        if kept is None:  # 0 are as near to 2 as 4
            with pytest.raises(Refused, match="has room in 2 tokens"):
                keep_best(method, prompt, run.tokenizer, cut_units(prompt, "context"), scores)
            continue
        new = keep_best(method, prompt, run.tokenizer, cut_units(prompt, "context"), scores)
        assert new.contexts == tuple(words[i] for i in kept), budget


def test_nothing_has_room(run: ModelRun) -> None:
    scores = [0.1, 0.3, 0.4, 0.3]
    with pytest.raises(Refused, match="has room in 0 tokens"):
        keep(0.1, scores, run)


def test_words_do_not_become_one() -> None:
    units = [Unit(0, "(2024"), Unit(0, " in"), Unit(0, "-"), Unit(0, "house"), Unit(0, ")"), Unit(1, "end.")]
    prompt = Segments(contexts=("(2024 in-house) ", "end."), question="?")
    assert join_units(prompt, units, {0, 3, 5}).contexts == ("(2024 house ", "end.")
    assert join_units(prompt, units, {1, 2, 3, 4}).contexts == ("in-house) ",)


def test_the_best_chunk_speaks_for_a_unit(run: ModelRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The question has two chunks, (1, 0) and (0, 1): of the units the second has two, the third is blank."""
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0], [0.8, 0.6], [0.0, -1.0]])
    owners = torch.tensor([0, 0, 1, 2, 2, 4])
    asked: list[Any] = []
    monkeypatch.setattr(_units, "embed_texts", lambda *told: asked.append(told) or Chunks(vectors, owners))
    found = compare(run, Extractive(), UNITS, "The code", "model")
    assert found == pytest.approx([0.7, 0.7, -torch.inf, -0.5])
    assert asked == [(run, ["The code", *WORDS], "model")] and run.log.notes["chunks"]["extractive"] == 2
