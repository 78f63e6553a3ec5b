"""Whatever a prompt looks like: what stays are its own tokens, in their order, and its last one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from effbench import tiny
from effbench.core.errors import Refused, Unsupported
from effbench.core.kinds import Shorten
from effbench.core.views import Segments
from effbench.methods.prompt._common import cut, join, list_parts
from effbench.methods.prompt.attention_pruning import AttentionPruning
from effbench.methods.prompt.extractive import Extractive
from effbench.methods.prompt.llmlingua import LLMLingua
from effbench.methods.prompt.longllmlingua import LongLLMLingua
from effbench.methods.prompt.random_tokens import RandomTokens
from effbench.methods.prompt.retrieval import Retrieval
from effbench.methods.prompt.selective_context import SelectiveContext
from effbench.methods.prompt.summarize import Summarize
from effbench.nn.run import ModelRun

STORY = "The old parrot ate some seeds in the kitchen. The code zisk gloxi. The rope of the doctor fell in the hall."
MORE = ("The code krox quurma. After the fog the mole looked for beetles.", "The coin fell in the tower. It rained.")
PASSAGE = f"Passage: {STORY}\nQuestion: What is the code zisk?\nAnswer:"
SAID = "Der Käfer sagt 漢字 😀. Ok? Ja. Naïve Wörter gibt es viele."
FOREIGN = f"Passage: {SAID}\n\nQuestion: Wer sagt 漢字?\nAnswer:"
PROMPTS = {
    "one context": Segments("", "Notes: ", (STORY + " ",), "The code zisk"),
    "template": Segments.divide(PASSAGE, {"context": STORY, "question": "What is the code zisk?"}),
    "several contexts": Segments(
        "Be brief. ", "Read. ", tuple(text + "\n\n" for text in (STORY, *MORE)), "The code krox"
    ),
    "unicode": Segments.divide(FOREIGN, {"context": SAID, "question": "Wer sagt 漢字?"}),
    "no white space": Segments(contexts=("漢字。", "日本語。", "😀😀。"), question="漢字？"),
    "contexts of one token": Segments(contexts=("The ", "code ", "fell "), question="The rope"),
    "empty contexts": Segments(contexts=("", STORY + " ", ""), question="The code zisk"),
    "odd white space": Segments(contexts=("  Two  words.\n \n",), question=" the\tcode  "),
    "question first": Segments.divide(f"Why? {STORY}", {"context": STORY, "question": "Why?"}),
    "whole": Segments(contexts=(PASSAGE + " ",), whole=True),
}
METHODS = (
    RandomTokens(),
    RandomTokens(keep=0.1),
    Retrieval(keep=0.7),
    Extractive(keep=0.5),
    LLMLingua(),
    LLMLingua(keep=0.6, step=7),
    LLMLingua(keep=0.6, order="topk"),
    LongLLMLingua(keep=0.6, reorder=False),
    SelectiveContext(unit="token"),
    SelectiveContext(unit="sentence", keep=0.7),
    AttentionPruning(),
    AttentionPruning(keep=0.3, queries="all"),
)
CLASSES = (
    *(RandomTokens, Retrieval, Extractive, LLMLingua, LongLLMLingua),
    *(SelectiveContext, AttentionPruning, Summarize),
)


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.MODEL)


def encode(text: str) -> list[int]:
    ids: list[int] = tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def is_subsequence(short: Sequence[object], long: Sequence[object]) -> bool:
    rest = iter(long)
    return all(entry in rest for entry in short)


def join_words(text: str) -> str:
    return "".join(text.split())


def test_prompts_with_the_question_first_are_whole() -> None:
    assert PROMPTS["question first"].whole and not PROMPTS["template"].whole


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_kept_tokens_are_those_of_the_rewritten_text(name: str, method: Shorten, run: ModelRun) -> None:
    prompt = PROMPTS[name]
    if method.asks and (not prompt.question or name == "odd white space"):
        pytest.skip("it needs a question, and more than one sentence")
    if getattr(method, "unit", "") in ("sentence", "token") and name in ("odd white space", "contexts of one token"):
        pytest.skip("there is one sentence, or each is a word, which without the space in front has more tokens")
    before, shortened = encode(prompt.text()), len(encode("".join(prompt.contexts)))
    try:
        new = method.rewrite(prompt, run)
    except Refused:
        assert method.keep * len(before) < len(before) - shortened + 2, "what is no context is more than may stay"
        return
    after = encode(new.text())
    assert len(after) < len(before) and after[-1] == before[-1]
    assert is_subsequence(join_words(new.text()), join_words(prompt.text()))
    if name == "one context":  # of words with a space in front; others are in pieces that may join in another way
        assert is_subsequence(after, before)
    assert "\ufffd" not in new.text()
    assert new.whole == prompt.whole and all(new.contexts)
    if not isinstance(method, LLMLingua | LongLLMLingua):
        assert (new.system, new.question.strip()) == (prompt.system, prompt.question.strip())
        assert new.instruction.strip() == prompt.instruction.strip()
        over = 2 + 2 * len(prompt.contexts) + (10 if getattr(method, "unit", "") == "sentence" else 0)
        assert len(after) <= method.keep * len(before) + over


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("cls", CLASSES)
def test_all_is_kept_exactly_as_it_is(name: str, cls: type[Shorten], run: ModelRun) -> None:
    assert cls.identity == {"keep": 1.0}
    assert cls(keep=1.0).rewrite(PROMPTS[name], run) == PROMPTS[name]


@pytest.mark.parametrize("cls", [RandomTokens, Retrieval, LLMLingua, LongLLMLingua])
def test_rewriting_depends_on_nothing_but_prompt_and_seed(cls: type[Shorten], run: ModelRun) -> None:
    first, second = (cls(keep=0.6).rewrite(PROMPTS["several contexts"], run) for _ in range(2))
    assert first == second != PROMPTS["several contexts"]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_slow_tokenizers_are_unsupported(method: Shorten, run: ModelRun) -> None:
    without = SimpleNamespace(
        seed=0, tokenizer=SimpleNamespace(is_fast=False), role=run.role, pad=0, progress=run.progress
    )
    without.tokenizer_of = lambda name: without.tokenizer
    without.share, without.reference = (lambda key, compute: compute()), run.reference
    with pytest.raises(Unsupported, match="fast tokenizer"):
        method.rewrite(PROMPTS["template"], without)  # type: ignore[arg-type]


def test_white_space_stays_behind_the_parts_so_that_methods_follow_each_other(run: ModelRun) -> None:
    new = RandomTokens(keep=0.5).rewrite(PROMPTS["several contexts"], run)
    assert [text[len(text.rstrip()) :][:2] for text in new.contexts] == ["\n\n"] * 3
    assert not any(text[:1].isspace() for text in list_parts(new))
    again = LLMLingua(keep=0.6).rewrite(Retrieval(keep=0.9).rewrite(new, run), run)
    assert is_subsequence(join_words(again.text()), join_words(new.text()))


def test_tokens_of_one_character_are_one_piece() -> None:
    pieces = cut(Segments("ï 漢", "字\n\n", question="a\n"), tokenizer())
    assert [piece.text for piece in pieces] == ["ï", " ", "漢", "字", "\n", "\n", "a", "\n"]
    assert [len(piece.ids) for piece in pieces] == [2, 1, 3, 3, 1, 1, 1, 1]
    assert [piece.part for piece in pieces] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [piece.stays for piece in pieces] == [False] * 4 + [True, True, False, True]


PARTS = st.text(st.sampled_from("ab .\n漢😀é"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(PARTS, PARTS, st.lists(PARTS, max_size=3), PARTS, st.data())
def test_pieces_are_the_prompt(system: str, instruction: str, contexts: list[str], question: str, data: Any) -> None:
    prompt = Segments(system, instruction, tuple(contexts), question)
    pieces = cut(prompt, tokenizer())
    assert "".join(piece.text for piece in pieces) == prompt.text()
    assert [token for piece in pieces for token in piece.ids] == encode(prompt.text())
    assert [piece.part for piece in pieces] == sorted(piece.part for piece in pieces)
    assert not pieces or pieces[-1].stays
    chosen = [piece for piece in pieces if piece.stays or data.draw(st.booleans())]
    new = join(prompt, chosen)
    assert join_words(new.text()) == join_words("".join(piece.text for piece in chosen))
    assert all(text.strip() for text in new.contexts[:-1])
