"""BM25 by its formula, and what it keeps."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.views import Segments
from effbench.methods.prompt._units import split_sentences
from effbench.methods.prompt.retrieval import Retrieval, score
from effbench.nn.kinds.prompt import rewrite
from effbench.nn.run import ModelRun

UNITS = ["the fog the mole", "the code zisk gloxi and more words", "the rope", "Code code, CODE zisk."]


def test_scores_by_hand() -> None:
    """ "code" twice in the question counts twice; "lamp" is nowhere; lengths 4, 7, 2 and 4, mean 4.25."""
    k1, b = 1.2, 0.75
    idf_code, idf_the = math.log(1 + 2.5 / 2.5), math.log(1 + 1.5 / 3.5)

    def weigh(f: int, length: int) -> float:
        return f * 2.2 / (f + 1.2 * (0.25 + 0.75 * length / 4.25))

    expected = [
        idf_the * weigh(2, 4),
        2 * idf_code * weigh(1, 7) + idf_the * weigh(1, 7),
        idf_the * weigh(1, 2),
        2 * idf_code * weigh(3, 4),
    ]
    assert np.allclose(score(UNITS, "The code, code lamp?", k1, b), expected, rtol=1e-12)


def test_words_of_scripts_without_spaces_are_found_and_letters_have_their_marks() -> None:
    units = ["电灯是爱迪生发明的。", "贝尔在一八七六年发明了电话。", "北京是中国的首都。"]
    scores = score(units, "谁发明了电话？", 1.2, 0.75)
    assert scores[1] > scores[0] > scores[2] == 0
    units = ["แมวกินปลา", "หมาวิ่งเร็ว"]
    assert score(units, "ปลา", 1.2, 0.75)[0] > 0 == score(units, "ปลา", 1.2, 0.75)[1]
    # Letters of which marks are left out are others': in the second word the vowel is another.
    assert score(["हिन्दी में", "हन्दा म"], "हिन्दी", 1.2, 0.75)[1] == 0


def test_extremes_of_the_parameters() -> None:
    once = [math.log(1 + 2.5 / 2.5) if i in (1, 3) else 0.0 for i in range(4)]
    assert np.allclose(score(UNITS, "code", 0.0, 0.75), once)  # a word counts once
    plain = score(UNITS, "code", 1.2, 0.0)  # whatever the length
    assert plain[3] / plain[1] == pytest.approx(3 * 2.2 / 4.2)
    assert score([], "code", 1.2, 0.75) == [] and score(["", " "], "code", 1.2, 0.75) == [0.0, 0.0]


def test_scores_of_rank_bm25() -> None:
    """With its own floor for words that are in more than half of the documents."""
    golden = load_file(Path(__file__).parents[2] / "golden" / "bm25.safetensors")
    spell = lambda row: " ".join(f"w{word}" for word in row.tolist() if word >= 0)  # noqa: E731
    documents, questions = ([*map(spell, golden[name])] for name in ("documents", "questions"))
    settings = golden.keys() - {"documents", "questions"}
    for name in settings:
        k1, b = re.fullmatch(r"(\d\.\d+)\.(\d\.\d+)", name).groups()  # type: ignore[union-attr]
        ours = [score(documents, question, float(k1), float(b), "okapi") for question in questions]
        assert np.allclose(ours, golden[name].numpy(), rtol=1e-12, atol=1e-12)
        assert not np.allclose([score(documents, question, float(k1), float(b)) for question in questions], ours)
    assert len(settings) == 3


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One two. Three? Four!  Five", ["One two. ", "Three? ", "Four!  ", "Five"]),
        ('He said "go." Then\n\nnew 3.5 line.\n', ['He said "go." ', "Then\n\n", "new 3.5 line.\n"]),
        ("漢字。日本語？はい", ["漢字。", "日本語？", "はい"]),
        ("", []),
    ],
)
def test_sentences_are_slices(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences and "".join(sentences) == text


Ask = Callable[..., tuple[Segments, Retrieval]]
FACTS = (
    "The rope fell in the hall. ",
    "The code zisk gloxi. ",
    "The coin fell in the tower. ",
    "The code krox quurma. ",
)


@pytest.fixture
def ask(of_contexts: Callable[[Segments, float], float]) -> Callable[..., tuple[Segments, Retrieval]]:
    """Contexts, and the method for a share of their tokens."""

    def make(*contexts: str, share: float, **settings: Any) -> tuple[Segments, Retrieval]:
        prompt = Segments("", "Notes: ", contexts, "The code krox")
        return prompt, Retrieval(keep=of_contexts(prompt, share), **settings)

    return make


def test_best_contexts_stay_in_their_order(ask: Ask, run: ModelRun) -> None:
    """7, 5, 7 and 5 tokens; the last has krox, the second code."""
    prompt, method = ask(*FACTS, share=10 / 24)
    assert method.rewrite(prompt, run).contexts == (FACTS[1], FACTS[3])
    prompt, method = ask(*FACTS, share=7.9 / 24)
    assert method.rewrite(prompt, run).contexts == (FACTS[3],)


def test_a_larger_budget_keeps_what_a_smaller_one_kept(ask: Ask, run: ModelRun) -> None:
    kept = [
        set(method.rewrite(prompt, run).contexts)
        for share in range(5, 21)
        for prompt, method in [ask(*FACTS, share=share / 24)]
    ]
    assert all(small <= large for small, large in itertools.pairwise(kept)) and len(kept[-1]) == 3


def test_sentences_of_a_single_context(ask: Ask, run: ModelRun) -> None:
    prompt, method = ask("".join(FACTS), share=10 / 24)
    new = method.rewrite(prompt, run)
    assert new.text() == "Notes: " + FACTS[1] + FACTS[3] + "The code krox"


def test_sentences_across_contexts(ask: Ask, run: ModelRun) -> None:
    prompt, method = ask(FACTS[0] + FACTS[1].strip() + "\n\n", FACTS[2] + FACTS[3], unit="sentence", share=12 / 26)
    assert method.rewrite(prompt, run).contexts == (FACTS[1].strip() + "\n\n", FACTS[3])


def test_words_of_the_template_around_a_context_go_with_it(
    of_contexts: Callable[[Segments, float], float], run: ModelRun
) -> None:
    named = {"context": "".join(FACTS).strip(), "question": "The code krox?"}
    prompt = Segments.divide(f"Passage: {named['context']}\nQuestion: The code krox?\nAnswer:", named)
    new = Retrieval(keep=of_contexts(prompt, 0.25)).rewrite(prompt, run)
    assert new.text() == "The code krox quurma.\nQuestion: The code krox?\nAnswer:"


def test_without_a_match_the_first_stay(of_contexts: Callable[[Segments, float], float], run: ModelRun) -> None:
    prompt = Segments("", "Notes: ", FACTS, "Why?")
    assert Retrieval(keep=of_contexts(prompt, 0.5)).rewrite(prompt, run).contexts == FACTS[:2]


def test_prompts_that_it_cannot_take(ask: Ask, run: ModelRun) -> None:
    prompt, method = ask(FACTS[0], FACTS[3], share=0.2)
    with pytest.raises(Refused, match="nothing that could stay whole has room in 2 tokens"):
        method.rewrite(prompt, run)
    with pytest.raises(Unsupported, match="reads the question"):
        rewrite(run, method, Segments(contexts=("The code krox",), whole=True))
    bare = Segments(question="The code krox")
    assert method.rewrite(bare, run) == bare


@pytest.mark.parametrize("settings", [{"k1": -0.1}, {"b": 1.1}, {"keep": 0.0}, {"unit": "word"}, {"idf": "plain"}])
def test_settings_that_mean_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        Retrieval(**settings)
