"""Segments: parts joined are exactly the prompt, whatever it is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from effbench.core.views import Segments

WORDS = st.text(alphabet="ab é漢🙂.:?\n\t\u00a0", max_size=14)
TEMPLATES = [
    "Passage: {c}\nQuestion: {q}\nAnswer:",
    "{c}\n{q}",
    "{c}{q}",
    "  {c} Therefore {q}?\n\n",
    "Question: {q}\nPassage: {c}\nAnswer:",
    "{q}",
    "{c}",
    "",
]
PASSAGE = "Passage: {c}\nQuestion: {q}\nAnswer:"


@given(st.sampled_from(TEMPLATES), WORDS, WORDS, st.lists(WORDS, max_size=3), WORDS)
@example("{c}{q}", "a", "a", [], "")
@example("{c}\n{q}", "", "", ["", " "], " ")
@example(PASSAGE, "a", "Question", ["a", "a"], "a")
def test_parts_joined_are_the_prompt(template: str, c: str, q: str, shots: list[str], system: str) -> None:
    """With examples in front, also ones that repeat, are empty, or stand in the template."""
    prompt = system + "\n\n".join([*shots, template.format(c=c, q=q)])
    segments = Segments.divide(prompt, {"system": system, "contexts": c, "question": q}, shots)
    assert segments.text() == prompt
    if segments.whole:
        assert segments == Segments(contexts=(prompt,), whole=True)


@given(st.lists(WORDS, max_size=4), WORDS, WORDS)
@example(["a", "a", "", "a"], "a", "a")
def test_every_named_part_is_found_in_its_place(contexts: list[str], instruction: str, question: str) -> None:
    prompt = " ".join([instruction, *contexts, question])
    segments = Segments.divide(prompt, {"instruction": instruction, "contexts": contexts, "question": question})
    named = [text for text in contexts if text.strip()]
    if not any(text.strip() for text in (instruction, *contexts, question)):
        assert segments.whole
        return
    assert segments.text() == prompt and not segments.whole
    assert len(segments.contexts) == len(named)
    assert all(text.strip() in part for text, part in zip(named, segments.contexts, strict=True))
    assert question.strip() in segments.question and instruction.strip() in segments.instruction


def test_a_template_is_divided_before_its_words() -> None:
    """What leads to a part belongs to it, with the white space behind it; what ends the prompt to the question."""
    prompt = PASSAGE.format(c="Rain fell.", q="What fell?")
    segments = Segments.divide(prompt, {"contexts": "Rain fell.", "question": "What fell?"})
    assert segments == Segments(contexts=("Passage: Rain fell.\n",), question="Question: What fell?\nAnswer:")


def test_examples_are_contexts() -> None:
    shots = [f"{PASSAGE.format(c=f'Context {i}.', q='What?')} it {i}" for i in range(2)]
    prompt = "\n\n".join(["Read.", *shots, PASSAGE.format(c="Rain fell.", q="What?")])
    segments = Segments.divide(prompt, {"system": "Read.", "context": "Rain fell.", "question": "What?"}, shots)
    assert segments.system == "Read.\n\n"
    assert segments.contexts == (f"{shots[0]}\n\n", f"{shots[1]}\n\n", "Passage: Rain fell.\n")
    assert segments.question == "Question: What?\nAnswer:" and segments.text() == prompt


def test_an_instruction_behind_examples_stays_behind_them() -> None:
    """Tasks repeat their instruction in every example."""
    shots = ["Notes: rain fell. What fell? rain", "Notes: snow fell. What fell? snow"]
    prompt = "\n\n".join([*shots, "Notes: hail fell. What fell?"])
    named = {"instruction": "Notes:", "contexts": "hail fell.", "question": "What fell?"}
    assert Segments.divide(prompt, named, shots).text() == prompt


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("Question: What fell?\nPassage: Rain fell.\nAnswer:", {"contexts": "Rain fell.", "question": "What fell?"}),
        ("Rain fell. What fell?", {"contexts": "Snow fell.", "question": "What fell?"}),
        ("Rain fell. What fell?", {"contexts": "Rain fell."}),  # nobody knows what the rest is
        ("Rain fell.", {"contexts": ["Rain fell.", "Rain fell."]}),  # twice named, once there
        ("Rain fell.", {}),
        ("Rain fell.", {"contexts": None, "question": " "}),
        ("", {"question": "What?"}),
    ],
)
def test_what_cannot_be_divided_is_whole(prompt: str, named: dict[str, Any]) -> None:
    """Among them prompts that ask first."""
    assert Segments.divide(prompt, named) == Segments(contexts=(prompt,), whole=True)


@given(st.lists(WORDS, min_size=1, max_size=4), st.data())
def test_other_contexts_keep_the_white_space_behind_them(contexts: list[str], data: st.DataObject) -> None:
    segments = Segments("system ", "", tuple(contexts), "question", whole=True)
    new = data.draw(st.lists(WORDS, min_size=len(contexts), max_size=len(contexts)))
    changed = segments.with_contexts(new)
    left = [(old, text) for old, text in zip(contexts, new, strict=True) if text.strip()]
    assert changed.contexts == tuple(text.strip() + old[len(old.rstrip()) :] for old, text in left)
    assert dataclasses.replace(changed, contexts=segments.contexts) == segments
    if all(text.strip() and text == text.lstrip() for text in contexts):
        assert segments.with_contexts(segments.contexts) == segments


def test_contexts_are_one_for_each() -> None:
    with pytest.raises(ValueError, match="zip"):
        Segments(contexts=("a ", "b ")).with_contexts(["a"])
