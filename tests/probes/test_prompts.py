"""Prompts of lm-eval's tasks by the parts that their YAML names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from effbench.core.errors import Unsupported
from effbench.core.views import Segments
from effbench.probes import prompts
from effbench.probes.prompts import Asker, divide, divided

ROWS = [
    {"c": f"{who} fell.", "q": f"What fell {when}?", "many": [f"{who} fell. ", f" {when} it was."], "a": who.lower()}
    for who, when in (("Rain", "today"), ("Snow", "once"), ("Hail", "late"), ("Fog", "never"))
]
COMMON = """
task: mine
custom_dataset: !function rows.load
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_target: "{{a}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
PASSAGE = 'doc_to_text: "Passage: {{c}}\\nQuestion: {{q}}\\nAnswer:"\n'
NAMED = 'metadata: {version: 1, segments: {contexts: "{{c}}", question: "{{q}}"}}\n'
FIRST = "fewshot_config: {sampler: first_n}\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Any]:
    """A run whose data have one task, of this YAML."""

    def write(body: str) -> Any:
        data = tmp_path / "items.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (tmp_path / "rows.py").write_text(
            "import json\nfrom datasets import Dataset, DatasetDict\n\n\n"
            "def load(**options):\n"
            f"    rows = [json.loads(line) for line in open({str(data)!r})]\n"
            "    return DatasetDict(test=Dataset.from_list(rows[:2]), train=Dataset.from_list(rows[2:]))\n"
        )
        (tmp_path / "mine.yaml").write_text(COMMON + body)
        return SimpleNamespace(data=SimpleNamespace(tasks=("mine",), task_paths=(tmp_path,)))

    return write


def read(run: Any) -> list[Segments]:
    """The prompts of the task, which are joined as they are."""
    (found,) = divided(run, {}, 8)
    (items,) = [items for _, items in prompts._list_items(run, {}, 8)]
    assert [segments.text() for segments in found] == [prompt for _, prompt in items]
    return found


def test_parts_by_templates(write: Callable[[str], Any]) -> None:
    assert read(write("num_fewshot: 0\n" + PASSAGE + NAMED)) == [
        Segments(contexts=("Passage: Rain fell.\n",), question="Question: What fell today?\nAnswer:"),
        Segments(contexts=("Passage: Snow fell.\n",), question="Question: What fell once?\nAnswer:"),
    ]


def test_a_field_is_taken_as_it_is(write: Callable[[str], Any]) -> None:
    """A list of contexts stays one, and no template is made of it."""
    text = "num_fewshot: 0\ndoc_to_text: \"{{many | join(' ')}} {{q}}\"\n"
    body = text + "metadata: {version: 1, segments: {contexts: {field: many}, question: {field: q}}}\n"
    first, _ = read(write(body))
    assert first == Segments(contexts=("Rain fell.   ", "today it was. "), question="What fell today?")


@pytest.mark.parametrize("delimiter", ["", 'fewshot_delimiter: " ## "\n'])
@pytest.mark.parametrize("description", ["", "Answer in a word.\\n\\n"])
def test_examples_are_contexts(write: Callable[[str], Any], delimiter: str, description: str) -> None:
    said = f'description: "{description}"\n' if description else ""
    segments, other = read(write("num_fewshot: 2\n" + FIRST + delimiter + said + PASSAGE + NAMED))
    between = " ## " if delimiter else "\n\n"
    assert segments.system.strip() == description.replace("\\n", "")
    *shots, own = segments.contexts
    assert len(shots) == 2 and own.endswith("Passage: Rain fell.\n")
    for shot, row in zip(shots, ROWS[2:], strict=True):
        assert f"Passage: {row['c']}\nQuestion: {row['q']}\nAnswer: {row['a']}" in shot
    assert "".join(shots).count(between.strip() or between) == (1 if delimiter else 2)
    assert segments.question == "Question: What fell today?\nAnswer:"
    assert other.contexts[:2] == segments.contexts[:2]


def test_a_description_may_be_a_template(write: Callable[[str], Any]) -> None:
    said = 'description: "Of {{a}} alone.\\n\\n"\n'
    segments, other = read(write("num_fewshot: 1\n" + FIRST + said + PASSAGE + NAMED))
    assert (segments.system, other.system) == ("Of rain alone.\n\n", "Of snow alone.\n\n")
    assert len(segments.contexts) == 2


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "metadata: {version: 1}\n",
        'metadata: {version: 1, segments: {contexts: "{{a}} never there", question: "{{q}}"}}\n',
        'metadata: {version: 1, segments: {question: "{{c}}", contexts: "{{q}}"}}\n',  # in the wrong order
    ],
)
@pytest.mark.parametrize("shots", [0, 2])
def test_a_task_without_segments_is_whole(write: Callable[[str], Any], metadata: str, shots: int) -> None:
    segments, _ = read(write(f"num_fewshot: {shots}\n" + FIRST + PASSAGE + metadata))
    assert segments.whole and len(segments.contexts) == 1 and not segments.question


# What is asked


def encode(text: str) -> list[int]:
    """A beginning, and a token for each character."""
    return [0, *map(ord, text)]


TASK = SimpleNamespace(
    config=SimpleNamespace(
        metadata={"segments": {"contexts": "{{c}}", "question": "{{q}}"}}, description="", fewshot_delimiter="\n\n"
    ),
    doc_to_text=lambda document: f"{document['c']} {document['q']}",
)
WHOLE = SimpleNamespace(config=SimpleNamespace(metadata={}))
DOCUMENT = {"c": "Rain fell.", "q": "What?"}
PROMPT = "Rain fell. What?"


def test_a_prompt_is_only_divided_where_that_counts() -> None:
    asker = Asker(encode, None)
    ask = asker.ask("t", WHOLE, DOCUMENT, PROMPT)
    assert (ask.ids, ask.given, ask.hold, ask.shortened) == (encode(PROMPT), encode(PROMPT), 1, False)
    assert not asker.whole


def test_whole_prompts_are_named_and_have_no_question_to_hold_back() -> None:
    asker = Asker(encode, lambda segments: segments)
    asker.ask("t", WHOLE, DOCUMENT, PROMPT)
    assert asker.whole == {"t"}
    with pytest.raises(Unsupported, match="t: evict_at=context, and a prompt has no question of its own"):
        Asker(encode, None, "context").ask("t", WHOLE, DOCUMENT, PROMPT)


def test_the_tokens_of_the_question_are_held_back() -> None:
    """Those that stand behind what the context alone would be."""
    ask = Asker(encode, None, "context").ask("t", TASK, DOCUMENT, PROMPT)
    assert ask.ids[-ask.hold :] == list(map(ord, " What?"))


def test_a_prompt_method_keeps_the_last_token() -> None:
    """Whatever it makes of the prompt; and it is called once for all choices of an item."""
    calls = []

    def halve(segments: Segments) -> Segments:
        calls.append(segments)
        return Segments(contexts=("Rain ",), question="Wh")

    asker = Asker(encode, halve, "context")
    first, second = (asker.ask("t", TASK, DOCUMENT, PROMPT) for _ in range(2))
    assert first is second and calls == [divide(TASK, DOCUMENT, PROMPT)]
    assert first.ids == [*encode("Rain Wh"), ord("?")] and first.given == encode(PROMPT) and first.shortened
    assert first.ids[-first.hold :] == list(map(ord, " Wh?"))
