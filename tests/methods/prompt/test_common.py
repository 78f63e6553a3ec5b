"""What prompt methods share: words that stay, models that judge, and texts longer than they can read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from effbench import tiny
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.views import Segments
from effbench.methods.prompt._common import (
    WORD,
    Judge,
    Piece,
    chunk,
    count_tokens,
    cut,
    find_forced,
    find_room,
    join,
    note_chunks,
    open_judge,
)
from effbench.methods.prompt.llmlingua import LLMLingua
from effbench.nn.infer.engine import Scored
from effbench.nn.run import ModelRun

TOKENIZER: Any = AutoTokenizer.from_pretrained(tiny.MODEL)
NEEDLES = [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / "needle_256.jsonl").open()]


def telling(text: str) -> set[str]:
    """Words with a digit or a capital letter."""
    return {word for word in WORD.findall(text) if any(letter.isdigit() or letter.isupper() for letter in word)}


def force(segments: Segments, tokenizer: Any = TOKENIZER) -> str:
    pieces = cut(segments, tokenizer)
    return join(segments, [piece for piece in pieces if piece in find_forced(segments, pieces)], apart=True).text()


def test_forced_words_are_whole() -> None:
    text = "the printing of 2024-11-27, by O'Neil (12)[34] in USA3 for Zanzibar. The rope. "
    prompt = Segments(instruction="go on ", contexts=(text,), question="what did Bo do with the rope")
    assert telling(text) == {"2024-11-27", "O'Neil", "12", "34", "USA3", "Zanzibar", "The"}
    words = WORD.findall(force(prompt))
    assert [*dict.fromkeys(words)] == ["2024-11-27", "O'Neil", "12", "34", "USA3", "Zanzibar", "rope", "Bo"]


def test_a_common_word_stays_where_it_could_be_halved() -> None:
    prompt = Segments(contexts=("Should she go",), whole=True)
    halves = [Piece("Sh", (1,), 0, False, 0), Piece("ould", (2,), 0, False, 2), Piece(" she", (3,), 0, False, 6)]
    assert find_forced(prompt, halves) == {*halves[:2]}
    whole = [Piece("Should", (1,), 0, False, 0), Piece(" she", (3,), 0, False, 6)]
    assert find_forced(prompt, whole) == set()


def test_special_tokens_stay() -> None:
    special = next(token for token in TOKENIZER.all_special_tokens if token != TOKENIZER.unk_token)
    prompt = Segments(contexts=(f"rope {special} fog",), whole=True)
    assert force(prompt).strip() == special


PARTS = st.text(st.sampled_from("ab AB12 .,-()'\n漢é"), max_size=14)


@settings(max_examples=300, deadline=None)
@given(st.lists(PARTS, max_size=3), PARTS, st.data())
def test_words_that_tell_something_are_those_of_the_prompt(contexts: list[str], question: str, data: Any) -> None:
    prompt = Segments(instruction="Ab 1.5", contexts=tuple(contexts), question=question)
    pieces = cut(prompt, TOKENIZER)
    forced = find_forced(prompt, pieces)
    chosen = [piece for piece in pieces if piece.stays or piece in forced or data.draw(st.booleans())]
    new = join(prompt, chosen, apart=True)
    common = {"A", "B", "a"}  # one piece each, which may go
    assert telling(prompt.text()) - common <= telling(new.text()) | common
    assert telling(new.text()) <= telling(prompt.text())
    assert "".join(new.text().split()) == "".join("".join(piece.text for piece in chosen).split())


def test_without_apart_words_are_joined() -> None:
    """What the rule is there for: 2024 and ing."""
    prompt = Segments(contexts=("2024 going",), whole=True)
    pieces = [Piece("2024", (1,), 0, False, 0), Piece(" go", (2,), 0, False, 4), Piece("ing", (3,), 0, True, 7)]
    assert join(prompt, [pieces[0], pieces[2]]).text() == "2024ing"
    assert join(prompt, [pieces[0], pieces[2]], apart=True).text() == "2024 ing"
    assert join(prompt, pieces, apart=True).text() == "2024 going"


def test_numbers_and_names_of_a_hundred_compressed_contexts(run: ModelRun) -> None:
    chance, exceptions = random.Random(0), []
    method = LLMLingua(keep=0.35, instruction=0.5, question=0.5, force=True)
    for row in NEEDLES[:100]:
        words = row["context"].split()[:40]
        for i in chance.sample(range(40), 6):
            words[i] = chance.choice(["2024", "3.14", "Zanzibar", "O'Neil,", "A380-800", "(1999)", "17:45"])
        prompt = Segments("", row["instruction"] + " ", (" ".join(words) + " ",), row["question"])
        new = method.rewrite(prompt, run).text()
        assert {"2024", "3.14", "Zanzibar", "O'Neil"} & telling(prompt.text()) <= telling(new) != telling(prompt.text())
        exceptions += telling(new) - telling(prompt.text())
    assert not exceptions and len(NEEDLES) >= 100


def test_chunks_end_with_sentences() -> None:
    prompt = Segments(contexts=("The rope fell. The fog fell. The hall fell down in the fog and the rope fell",))
    pieces = cut(prompt, TOKENIZER)
    runs = [*chunk(pieces, 10)]
    assert [piece for run_ in runs for piece in run_] == pieces and all(count_tokens(run_) <= 10 for run_ in runs)
    assert "".join(piece.text for piece in runs[0]) == "The rope fell. The fog fell."
    assert [len(run_) for run_ in chunk(pieces[:3], 1)] == [1, 1, 1]


class Reader:
    """An engine that says what it was asked: the loss of a token is its id, and pairs have to fit."""

    max_length = 10

    def __init__(self) -> None:
        self.pairs: list[tuple[list[int], list[int]]] = []

    def score(self, pairs: Any) -> list[Scored]:
        assert all(len(front) + len(ids) - 1 <= self.max_length for front, ids in pairs)
        self.pairs = list(pairs)
        return [Scored(0.0, False, [-float(token) for token in ids]) for _, ids in pairs]


def test_text_beyond_the_window_is_judged_in_chunks() -> None:
    engine = Reader()
    judge = Judge(TOKENIZER, engine)  # type: ignore[arg-type]
    ids = [*range(100, 109)]
    assert judge.losses([([0, 1], [], ids), ([0], [5], [7])]) == [[*map(float, ids)], [7.0]]
    assert engine.pairs == [([0, 1], ids), ([0, 5], [7])] and judge.chunks == 1
    ids = [*range(100, 110)]
    assert judge.losses([([0, 1], [], ids)]) == [[*map(float, ids)]]  # 9 have room behind what is in front
    assert engine.pairs == [
        ([0, 1], [100, 101, 102, 103]),
        ([0, 1, 100, 101, 102, 103], [104, 105, 106, 107]),
        ([0, 1, 101, 102, 103, 104, 105, 106, 107], [108, 109]),
    ]
    assert judge.chunks == 3
    judge.losses([([0], [*range(20)], [100, 101])])  # of what was read before only the last is
    assert engine.pairs == [([0, *range(12, 20)], [100, 101])] and judge.chunks == 5
    with pytest.raises(Unsupported, match="10 tokens that all is judged behind leave no room in 10 positions"):
        judge.losses([([*range(10)], [], [1, 2])])
    run: Any = SimpleNamespace(log=SimpleNamespace(notes={}))
    for chunks in (1, 3, 2):
        note_chunks(run, LLMLingua(), chunks)
    assert run.log.notes == {"chunks": {"llmlingua": 3}}


def test_room_of_contexts() -> None:
    assert find_room(LLMLingua(), 50, 15.5) == 9.5 and find_room(LLMLingua(keep=0.1), 30, 3) == 0
    with pytest.raises(Refused, match="of 50 tokens instruction and question alone need more than the 25"):
        find_room(LLMLingua(), 50, 25.5)


def test_a_compressor_by_its_place(run: ModelRun, tmp_path: Path) -> None:
    row = NEEDLES[0]
    prompt = Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)
    place = str(tmp_path / "small")
    run.model.save_pretrained(place)
    run.tokenizer.save_pretrained(place)
    method = LLMLingua(compressor=place)
    assert method.files() and not method.reads and LLMLingua().reads == {"reference": set()}
    assert method.rewrite(prompt, run) == LLMLingua().rewrite(prompt, run)
    judge = open_judge(run, place)
    assert judge.engine.model is open_judge(run, place).engine.model and judge.engine.model is not run.model
    with pytest.raises(Usage, match=r"compressor: model=\./none: no such folder"):
        LLMLingua(compressor="./none").files()
