"""Five parts that share nothing, examples that carry what their source says, and text that selectors never see."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from effbench import sources, tiny
from effbench.checks import toy_run
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.kinds import Select
from effbench.core.views import Segments
from effbench.nn.data import Data, Part, open_data
from effbench.sources.duplicates import count_shared
from effbench.sources.text import PARTS, Document


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.MODEL)


def texts(data: Data) -> dict[str, list[str]]:
    return {part: data.documents(part) for part in PARTS}


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "tiny:task",
        "tiny:planted",
        pytest.param("tiny:questions", marks=pytest.mark.slow),
        "speeches",
        "speeches:presidents",
    ],
)
def test_the_parts_that_ship_share_no_document_and_no_near_duplicate(name: str, tokenizer: Any) -> None:
    data = open_data(sources.data(name), tokenizer)._examined
    parts = {part: found[:200] for part, found in texts(data).items()}
    assert all(parts.values())
    for part, found in parts.items():
        for other, rest in parts.items():
            if part != other:
                assert not set(found) & set(rest), (part, other)
                if name != "tiny":  # whose documents are drawn from a few hundred words
                    assert count_shared(found, rest) == 0, (part, other)


@pytest.mark.parametrize("number", [1, 2, 3, 5, 10, 30])
def test_every_corpus_has_all_parts_as_far_as_it_goes(number: int, tokenizer: Any, tmp_path: Path) -> None:
    world = tiny.documents("train", 40)
    for i in range(number):
        (tmp_path / f"{i}.txt").write_text("\n".join(world[i : i + 10]))
    data = open_data(sources.data(f"text:{tmp_path}"), tokenizer)
    found = texts(data)
    together = [text for part in found.values() for text in part]
    assert len(set(together)) == len(together)
    assert found["train"] and found["heldout"] and found["calibration"]
    if number not in (3, 5):  # of which one document may be all that is left to train on
        assert found["validation"] and found["target"] and data.validation and data.target


def test_examples_carry_text_and_what_their_source_says(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        {"prompt": f"Question {i}:", "completion": f" answer {i}.", "skill": f"s{i % 3}", "n": i} for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    data = open_data(sources.data(f"jsonl:{path}"), tokenizer)
    for example in [*data.pool, *data.validation, *data.target, *data.unseen]:
        number = example.meta["n"]
        assert example.meta == {"skill": f"s{number % 3}", "n": number}
        assert example.text == f"Question {number}: answer {number}."
    (kinds,) = {frozenset(example.meta) for example in open_data(sources.data("tiny"), tokenizer).pool[:50]}
    assert kinds == {"skill"}


def test_prompts_and_answers_are_tokenised_apart_and_joined(tokenizer: Any) -> None:
    """As generation will be fed, whatever the tokenizer would make of the whole."""
    for cut in range(1, 12):
        text = "Anna lives in Arden."
        document = Document(text, "d", cut)
        (example,) = Data("d", {"train": Part([document] * 1), "validation": Part(())}, tokenizer).pool
        front = tokenizer(text[:cut], add_special_tokens=True)["input_ids"]
        front = front[:-1] if front and front[-1] == tokenizer.eos_token_id else front
        assert list(example.ids[: example.prompt]) == front
        assert example.ids[-1] == tokenizer.eos_token_id
        inner = example.ids[example.prompt : -1]
        assert list(inner) == tokenizer(text[cut:], add_special_tokens=False)["input_ids"]


def test_the_new_task_is_asked_in_words_that_the_model_knows(tokenizer: Any) -> None:
    data = open_data(sources.data("tiny:task"), tokenizer)
    known = {token for text in tiny.documents("train", 3000) for token in tokenizer(text)["input_ids"]}
    for example in [*data.pool[:300], *data.unseen[:100]]:
        assert set(example.ids[1:-1]) <= known
        assert 4 <= len(example.ids) - example.prompt <= 8
    people = {example.text.split()[-2:][0] for example in data.pool}
    assert people and len(data.heldout_ids(100)) == 100  # the old world is what is measured


def test_a_selection_that_looks_at_held_out_text_is_refused(tokenizer: Any) -> None:
    ways: dict[str, Any] = {
        "documents": lambda data: data.documents("heldout"),
        "ids": lambda data: data.heldout_ids(10),
        "unseen": lambda data: data.unseen,
    }

    @dataclasses.dataclass(frozen=True)
    class Peeping(Select):
        way: str = "ids"

        def order(self, examples: Any, run: Any) -> list[int]:
            assert run.data.target and run.data.validation
            ways[self.way](run.data)
            return list(range(len(examples)))

    for way, look in ways.items():
        run = toy_run()
        run.data = open_data(sources.data("tiny:task"), tokenizer)
        with pytest.raises(Refused, match="a selection must not look at it"):
            run.apply(Peeping(way=way))
        look(run.data)  # anybody else may


def test_near_duplicates_of_ones_own_data_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    words = [f"word{i}" for i in range(400)]
    rows = [" ".join(words[(7 * i) % 300 : (7 * i) % 300 + 30]) + f" {i}" for i in range(60)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    data = open_data(sources.data(f"jsonl:{path}"), tokenizer)
    found = data.count_near_duplicates()
    learned = [set(text.split()) for part in PARTS if part != "heldout" for text in data.documents(part)]
    held = [set(text.split()) for text in data.documents("heldout")]
    assert found == sum(any(len(a & b) >= 0.7 * len(a | b) for b in learned) for a in held)
    assert open_data(sources.data("tiny"), tokenizer).count_near_duplicates() is None


# Data of the Hub


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(path: str, configuration: str | None) -> Any:
        row = {
            "question": [f"Who is {i}?" for i in range(30)],
            "answer": [f" Anna {i}" for i in range(30)],
            "level": [*range(30)],
        }
        made = datasets.Dataset.from_dict(row)
        return datasets.DatasetDict({"train": made.select(range(20)), "test": made.select(range(20, 30))})

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("rows")
def test_columns_of_the_hub_can_be_named(tokenizer: Any) -> None:
    data = open_data(sources.data("hub:org/name[prompt=question,completion=answer]"), tokenizer)
    example = data.unseen[0]
    assert example.text == "Who is 20? Anna 20" and example.meta == {"level": 20} and example.prompt > 1
    assert len(data.documents("train")) + len(data.documents("target")) + len(data.documents("validation")) == 18
    with pytest.raises(Unsupported, match="has no column of text called 'text', but question, answer, level"):
        open_data(sources.data("hub:org/name"), tokenizer)


@pytest.mark.parametrize(
    "name", ["a/b[prompt=x]", "a/b[text=x,prompt=y]", "a/b[x]", "a/b[text=x", "a/b[prompt=x,prompt=y]"]
)
def test_columns_that_make_no_example_are_wrong_usage(name: str) -> None:
    with pytest.raises(Usage, match="bracket"):
        sources.data(f"hub:{name}")


def test_prompts_carry_their_parts_where_the_source_names_them(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        {
            "prompt": f"Read. The code is {i}. What is it?",
            "completion": f" {i}.",
            "instruction": "Read.",
            "context": f"The code is {i}.",
            "question": "What is it?",
        }
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    example = open_data(sources.data(f"jsonl:{path}"), tokenizer).pool[0]
    assert example.segments == Segments("", "Read. ", (f"{example.meta['context']} ",), "What is it?")
    asked = open_data(sources.data("tiny:questions"), tokenizer).pool[0].segments
    assert asked is not None and len(asked.contexts) == 5 and asked.question.startswith("The code ")
    (whole,) = {example.segments.contexts[0] for example in open_data(sources.data("tiny:task"), tokenizer).pool[:1]}
    assert whole.startswith("People: ") and whole.endswith(" So:")
    assert open_data(sources.data("tiny"), tokenizer).pool[0].segments is None
