"""The pool with planted noise, duplicates, an off-domain and an in-domain part: what is said of it is so."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import Any

import pytest
from transformers import AutoTokenizer

from effbench import sources, tiny
from effbench.nn.data import open_data
from effbench.tiny import planted

POOL = planted.plant()


def grams(text: str) -> frozenset[tuple[str, ...]]:
    words = text.split()
    return frozenset(tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4)))


def jaccard(one: str, other: str) -> float:
    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def data() -> Any:
    return open_data(sources.data("tiny:planted"), AutoTokenizer.from_pretrained(tiny.MODEL))


def test_a_fifth_of_the_pool_can_hold_the_part_of_the_targets_kind() -> None:
    counts = Counter(item.planted for item in POOL)
    assert len(POOL) == planted.SIZE == 2000
    assert counts == {"": 1060, "in": 240, "off": 300, "noise": 200, "duplicate": 200}
    assert {item.noise for item in POOL if item.planted == "noise"} == {"shuffled", "gibberish", "wrong"}
    assert {item.source for item in POOL} == {"world", "drills", "task"}
    assert all((item.planted == "noise") == bool(item.noise) for item in POOL)
    assert {item.planted for item in POOL if item.source == "task"} == {"in", "noise", "duplicate"}
    kinds = Counter(item.planted for item in POOL[:400])  # in random order
    assert all(0.5 < kinds[kind] / counts[kind] * 5 < 1.5 for kind in counts)
    assert planted.plant() == POOL != planted.plant(1)


def test_near_duplicates_are_those_that_are_said_to_be_and_no_others() -> None:
    said = {(place, other) for place, item in enumerate(POOL) for other in item.near}
    assert said == {(other, place) for place, other in said}
    assert all(jaccard(POOL[one].text, POOL[other].text) >= 0.7 for one, other in said)
    having: dict[Any, list[int]] = defaultdict(list)
    for place, item in enumerate(POOL):
        for gram in grams(item.text):
            having[gram].append(place)
    shared = {pair for places in having.values() for pair in itertools.combinations(places, 2)} - said
    assert len(shared) > 1000 and max(jaccard(POOL[one].text, POOL[other].text) for one, other in shared) < 0.69


def test_chains_join_texts_that_differ_and_short_texts_are_short() -> None:
    middles = [item for item in POOL if len(item.near) == 2]
    assert len(middles) == planted.CHAINS and {item.planted for item in middles} == {"duplicate"}
    for item in middles:
        one, other = (POOL[place] for place in item.near)
        assert jaccard(one.text, other.text) < 0.66 and one.planted == other.planted == ""
    short = [item.text for item in POOL if len(item.text.split()) < 5]
    assert len(short) == planted.SHORT + planted.COPIED["short"] and len(set(short)) == planted.SHORT
    redundant = sum(item.planted == "duplicate" for item in POOL)
    assert redundant == sum(planted.COPIED.values()) + planted.CHAINS


def test_wrong_answers_have_the_form_of_right_ones_and_shuffled_words_are_those_of_texts() -> None:
    for item in POOL:
        if item.source == "task":
            assert item.prompt is not None
            passage, answer = item.text[: item.prompt], item.text[item.prompt :]
            said = [word in passage for word in answer.strip(" .").split()]
            assert len(said) == 5 and all(said) == (item.planted != "noise")
            assert item.label == answer.split()[0]
        else:
            assert item.prompt is None and item.label == ""


def test_the_pool_is_read_as_data_with_its_truth(data: Any) -> None:
    pool = data.pool
    assert len(pool) == 2000 and [example.text for example in pool] == [item.text for item in POOL]
    assert max(len(example.ids) for example in pool) <= 64
    places = {example.id: place for place, example in enumerate(pool)}
    assert [tuple(places[name] for name in example.meta["near"]) for example in pool] == [item.near for item in POOL]
    assert {tuple(example.meta) for example in pool} == {("source", "skill", "label", "planted", "noise", "near")}
    tokenizer = data._tokenizer
    known = {token for text in tiny.documents("train", 3000) for token in tokenizer(text)["input_ids"]}
    known |= {tokenizer.eos_token_id}
    assert {token for example in pool for token in example.ids} <= known


def test_target_validation_and_held_out_text_are_of_the_in_domain_kind(data: Any) -> None:
    inside = {example.text for example in data.pool if example.meta["planted"] == "in"}
    for part in (data.target, data.validation, data.unseen):
        assert len(part) >= 200
        for example in part:
            assert example.meta["planted"] == "in" and example.prompt and example.text not in inside
    assert data.tasks == ("tiny",) and len(data.heldout_ids(100)) == 100  # the old world is what is measured


def test_what_the_generator_says_is_part_of_the_datas_digest() -> None:
    digests = {sources.data(name).digest for name in ("tiny", "tiny:task", "tiny:questions")}
    assert len(digests) == 1 and sources.data("tiny:planted").digest not in digests
