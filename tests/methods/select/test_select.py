"""Selectors: what they keep, in which order, and what they never see."""

from __future__ import annotations

import dataclasses
import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys_training import fit

from effbench.checks import Reading, toy_run
from effbench.core.recipe import parse_step
from effbench.core.views import Example
from effbench.methods.select.anti_curriculum import AntiCurriculum
from effbench.methods.select.curriculum import Curriculum
from effbench.methods.select.minhash_dedup import MinHashDedup
from effbench.methods.select.random_selection import RandomSelection
from effbench.nn.run import ModelRun
from effbench.sources.duplicates import Signatures, count_shared


def numbered(run: ModelRun) -> list[int]:
    return [int(example.id) for example in run.data.train]


def test_random_selection_is_uniform_and_belongs_to_the_seed() -> None:
    counts = torch.zeros(64)
    examples = toy_run().data.pool
    for seed in range(300):
        run: Any = SimpleNamespace(seed=seed)
        best = RandomSelection().score(examples, run).argsort(descending=True)[:16]
        assert len(set(best.tolist())) == 16
        counts[best] += 1
    # Each example is in with probability 1/4: a count has mean 75 and deviation 7.5.
    assert counts.min() > 75 - 4.5 * 7.5 and counts.max() < 75 + 4.5 * 7.5
    again = toy_run(seed=7)
    again.apply(RandomSelection(keep=0.25))
    other = toy_run(seed=7)
    other.apply(RandomSelection(keep=0.25))
    assert numbered(again) == numbered(other)


def test_a_share_is_of_the_pool_and_a_later_selection_keeps_the_count() -> None:
    run = toy_run()
    run.apply(RandomSelection())
    assert len(run.data.train) == 13  # a fifth of 64
    found = set(numbered(run))
    run.apply(Curriculum())
    assert set(numbered(run)) == found and len(run.data.reserve) == 51
    run.apply(RandomSelection(keep=0.1))
    assert len(run.data.train) == 6 and set(numbered(run)) < found


@pytest.mark.parametrize("later", [RandomSelection(keep=0.5), Curriculum(keep=0.5), MinHashDedup(keep=0.5)])
def test_one_that_is_told_to_keep_more_takes_the_next_of_the_ranking(later: Any) -> None:
    run = toy_run()
    run.apply(RandomSelection(keep=0.1))
    best = [*numbered(run), *(int(example.id) for example in run.data.reserve)]
    run.apply(later)
    assert sorted(numbered(run)) == sorted(best[:32]) and len(run.data.reserve) == 32


@pytest.mark.parametrize("difficulty", ["loss", "length"])
@pytest.mark.parametrize(("method", "sign"), [(Curriculum, 1), (AntiCurriculum, -1)])
def test_a_curriculum_goes_from_easy_to_hard_and_an_anti_curriculum_from_hard_to_easy(
    method: Any, sign: int, difficulty: Any
) -> None:
    run = toy_run()
    chance = random.Random(0)
    run.data.pool = [
        dataclasses.replace(example, ids=example.ids[: chance.randint(4, 32)]) for example in run.data.pool
    ]
    run.apply(method(difficulty=difficulty))
    if difficulty == "length":
        hardness = [float(len(example.ids)) for example in run.data.train]
    else:
        hardness = []
        for example in run.data.train:
            ids = torch.tensor([example.ids])
            with torch.no_grad():
                hardness.append(float(run.reference(ids, labels=ids).loss))
    pairs = itertools.pairwise(sign * value for value in hardness)
    assert all(a <= b + 1e-5 for a, b in pairs) and sign * hardness[-1] > sign * hardness[0]
    read: list[tuple[int, ...]] = []
    run.train.chain("batch").append(Reading(read))
    fit(run, steps=2)
    assert read == [example.ids for example in run.data.train[:8]]


# Duplicates

CHANCE = random.Random(1)
WORDS = [f"w{i}" for i in range(2000)]


def text(length: int = 60) -> list[str]:
    return CHANCE.choices(WORDS, k=length)


def changed(words: list[str], number: int) -> list[str]:
    """The words with so many at the end replaced."""
    return words[: len(words) - number] + text(number)


class Spelled:
    """A tokenizer whose tokens are words."""

    pad_token_id = 0

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(WORDS[i] for i in ids)


def spelled(texts: list[list[str]]) -> ModelRun:
    run = toy_run()
    run.tokenizer = Spelled()
    place = {word: i for i, word in enumerate(WORDS)}
    run.data.pool = [Example(str(i), tuple(place[word] for word in words)) for i, words in enumerate(texts)]
    return run


def jaccard(one: list[str], other: list[str], n: int = 5) -> float:
    a, b = ({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (one, other))
    return len(a & b) / len(a | b)


def test_planted_duplicates_go_and_the_rest_stays() -> None:
    originals = [text() for _ in range(40)]
    copies = [changed(words, 3) for words in originals[:10]]
    assert min(jaccard(a, b) for a, b in zip(originals, copies, strict=False)) > 0.85
    run = spelled([*originals, *copies])
    run.apply(MinHashDedup())
    assert numbered(run) == list(range(40))
    far = spelled([*originals, *(changed(words, 30) for words in originals[:10])])
    far.apply(MinHashDedup())
    assert numbered(far) == list(range(50))


def test_the_better_ranked_of_two_stays_and_the_next_fills_up() -> None:
    originals = [text() for _ in range(20)]
    run = spelled([changed(originals[3], 1), *originals])
    run.apply(parse_step("random_selection(keep=0.5)"))
    ranking = [int(example.id) for example in [*run.data.train, *run.data.reserve]]
    run.apply(MinHashDedup())
    expected = [i for i in ranking if i != (4 if ranking.index(0) < ranking.index(4) else 0)]
    assert numbered(run) == expected[:10]


def test_signatures_estimate_the_jaccard_index() -> None:
    signatures = Signatures(permutations=512)
    for number in (0, 2, 8, 20):
        one = text(200)
        other = changed(one, number)
        estimate = signatures.compare(*(signatures.sign(signatures.shingle(words)) for words in (one, other)))
        assert estimate == pytest.approx(jaccard(one, other), abs=0.08)


def test_shared_texts_are_counted_exactly() -> None:
    texts = [" ".join(text()) for _ in range(50)]
    near = [" ".join(changed(words.split(), 6)) for words in texts[:7]]
    assert count_shared(near, texts) == 7 and count_shared(texts, near) == 7
    assert count_shared([" ".join(text()) for _ in range(50)], texts) == 0
    assert count_shared([" ".join(changed(words.split(), 30)) for words in texts[:7]], texts) == 0


@pytest.mark.parametrize("step", ["random_selection()", "curriculum()", "minhash_dedup()"])
def test_what_was_chosen_is_written_down(step: str) -> None:
    run = toy_run()
    run.apply(parse_step(step))
    (chosen,) = run.log.chosen.values()
    assert chosen == [[example.id, 1.0] for example in run.data.train] and "chosen" not in run.log.to_json()
    fit(run, steps=1)
