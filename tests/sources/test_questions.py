"""Questions over the speeches: only the fact that was put there has the answer, and places take even turns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from effbench import sources, tiny
from effbench.core.errors import Usage
from effbench.nn.data import open_data
from effbench.probes.lm_tasks import load, quiet
from effbench.probes.prompts import divide
from effbench.sources import questions
from effbench.sources.questions import ANIMALS, CHOICES, DEPTHS, ITEMS, NAMES, PASSAGES, TASKS, WORDS, Question
from effbench.sources.text import read_speeches

FACTS = {"needle": "The secret word of {} is {}.", "passages": "The favorite animal of {} is the {}."}
PLACES = {"needle": DEPTHS, "passages": PASSAGES}
of_each = pytest.mark.parametrize("name", TASKS)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def find_facts(item: Question, name: str) -> list[re.Match[str]]:
    """The facts in each context of an item; who and what are groups."""
    pattern = FACTS[name].replace(".", r"\.").format(r"(\w+)", r"(\w+)")
    return [found for context in item.contexts for found in re.finditer(pattern, context)]


def test_no_held_out_address_names_what_facts_are_of() -> None:
    said = {word for address in read_speeches().parts["heldout"] for word in words(address.text)}
    assert not said & {name.lower() for name in NAMES} and not said & {*ANIMALS}
    assert len({len(animal) for animal in ANIMALS}) == 1  # so that no choice is longer than another
    assert len({*NAMES}) == len(NAMES) and len({*ANIMALS}) == len(ANIMALS) > CHOICES


@of_each
def test_the_answer_is_in_the_fact_that_is_asked_for_and_nowhere_else(name: str) -> None:
    for item in TASKS[name]():
        assert len({*item.choices}) == CHOICES and {*item.choices} <= {*ANIMALS}
        answer, who = item.choices[item.gold], next(who for who in NAMES if who in item.question)
        prompt = " ".join([item.instruction, *item.contexts, item.question])
        assert words(prompt).count(answer) == 1
        (fact,) = [fact[0] for fact in find_facts(item, name) if fact.groups() == (who, answer)]
        assert answer not in words(prompt.replace(fact, ""))  # the needle taken away
        assert prompt.count(fact) == 1 and answer not in words(item.question)


@pytest.mark.parametrize("wrong", ["twice", "in the question"])
def test_an_answer_elsewhere_would_be_found(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def spoil(item: Question) -> Question:
        answer = item.choices[item.gold]
        if wrong == "twice":
            return item._replace(contexts=[f"{item.contexts[0]} The {answer} again."])
        return item._replace(question=f"{item.question} the {answer}, is")

    items = [spoil(item) for item in TASKS["needle"]()]
    monkeypatch.setitem(TASKS, "needle", lambda: items)
    with pytest.raises(AssertionError):
        test_the_answer_is_in_the_fact_that_is_asked_for_and_nowhere_else("needle")


@of_each
def test_places_and_answers_come_evenly_in_whatever_is_taken(name: str) -> None:
    items, number = TASKS[name](), PLACES[name]
    assert len(items) == ITEMS
    for taken in range(1, ITEMS + 1):
        counts = Counter(item.place for item in items[:taken])
        assert max(counts.values()) - min(counts[place] for place in range(number)) <= 1
    gold = Counter(item.gold for item in items)
    assert min(gold[place] for place in range(CHOICES)) >= ITEMS / CHOICES / 2


def test_a_needle_is_as_deep_as_its_place_says() -> None:
    for item in TASKS["needle"]():
        (context,), (fact,) = item.contexts, find_facts(item, "needle")
        before, after = (len(part.split()) for part in (context[: fact.start()], context[fact.end() :]))
        wanted = item.place / (DEPTHS - 1)
        assert before / (before + after) == pytest.approx(wanted, abs=0.06)  # half of the longest sentence
        assert not {*item.choices} & {*words(context[: fact.start()] + context[fact.end() :])}
    few = sorted(item.place for item in TASKS["needle"]()[:4])
    assert few == [0, 3, 6, 9]


def test_passages_are_of_different_addresses_and_every_choice_is_in_one() -> None:
    addresses = {" ".join(address.text.split()): address.name for address in read_speeches().parts["heldout"]}
    for item in TASKS["passages"]():
        facts = find_facts(item, "passages")
        assert len(item.contexts) == len(facts) == PASSAGES
        assert {*item.choices} < {fact[2] for fact in facts} and len({fact[1] for fact in facts}) == PASSAGES
        assert facts[item.place][2] == item.choices[item.gold] and facts[item.place][1] in item.question
        spoken = []
        for context, fact in zip(item.contexts, facts, strict=True):
            first = questions.SENTENCE.split(context.replace(fact[0], "").strip())[0]
            spoken += [name for text, name in addresses.items() if first in text]
        assert len({*spoken}) == PASSAGES


@of_each
def test_texts_are_of_held_out_addresses_and_none_comes_twice(name: str) -> None:
    parts = {
        part: " ".join(" ".join(address.text.split()) for address in found)
        for part, found in read_speeches().parts.items()
    }
    seen: Counter[str] = Counter()
    for item in TASKS[name]():
        assert WORDS * 0.8 <= sum(len(context.split()) for context in item.contexts) <= WORDS + 8 * len(item.contexts)
        for context in item.contexts:
            (fact,) = [fact[0] for fact in find_facts(item._replace(contexts=[context]), name)]
            sentences = questions.SENTENCE.split(context)
            assert fact in sentences
            sentences.remove(fact)
            assert all(sentence in parts["heldout"] for sentence in sentences)
            assert not any(sentence in parts[part] for sentence in sentences[:1] for part in ("train", "calibration"))
            seen[" ".join(sentences)] += 1
    assert max(seen.values()) == 1


@of_each
def test_prompts_are_divided_into_their_parts(name: str) -> None:
    folders, task = sources.data("speeches:questions").task_folders, f"speeches_{name}"
    with quiet():
        tasks, failures = load([task], folders)
    assert not failures
    opened = tasks["tasks"][task]
    documents = [*opened.test_docs()]
    assert len(documents) == ITEMS and opened.config.metadata["chance"] == 1 / CHOICES
    for document, item in zip(documents, TASKS[name](), strict=True):
        prompt = opened.doc_to_text(document)
        parts = divide(opened, document, prompt)
        assert not parts.whole and parts.text() == prompt
        assert parts.instruction.strip() == item.instruction and parts.question == item.question
        assert [context.strip() for context in parts.contexts] == item.contexts
        assert opened.doc_to_choice(document)[opened.doc_to_target(document)] == item.choices[item.gold]


def test_the_data_are_the_speeches_with_tasks_of_their_own() -> None:
    source, plain = sources.data("speeches:questions"), sources.data("speeches")
    data, other = (open_data(each, AutoTokenizer.from_pretrained(tiny.MODEL)) for each in (source, plain))
    assert data.tasks == ("speeches",) and not other.tasks and not plain.task_folders
    assert data.protocol == other.protocol  # perplexity on the one is that on the other
    for part in ("train", "calibration", "heldout"):
        assert data.documents(part) == other.documents(part)
    with quiet():
        found, _ = load([*data.tasks], data.task_paths)
    assert {*found["tasks"]} == {f"speeches_{name}" for name in TASKS}
    assert sources.find_data("speeches:questions") == source
    with pytest.raises(Usage, match="speeches:questions"):
        sources.data("speeches:question")


CHANGES: dict[str, Callable[[Any], Any]] = {
    "NAMES": lambda names: (*names[:-1], "Stella"),
    "WORDS": lambda most: most - 40,
    "INSTRUCTION": lambda text: text.replace("text", "texts"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_the_digest_is_of_what_is_asked(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    digest = questions.read_questions().digest
    assert digest == questions.read_questions.__wrapped__().digest != read_speeches().digest
    monkeypatch.setattr(questions, changed, CHANGES[changed](getattr(questions, changed)))
    assert questions.read_questions.__wrapped__().digest != digest


def test_the_digest_is_of_the_tasks_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for path in questions.FOLDER.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(questions, "FOLDER", tmp_path)
    assert questions.read_questions.__wrapped__().digest == questions.read_questions().digest
    (tmp_path / "speeches_needle.yaml").write_text("task: other\n")
    assert questions.read_questions.__wrapped__().digest != questions.read_questions().digest
