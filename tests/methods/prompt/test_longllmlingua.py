"""LongLLMLingua's numbers by plain transformers, its rates by hand, and the order that it brings documents into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from effbench import tiny
from effbench.core.errors import Refused, Usage
from effbench.core.views import Segments
from effbench.methods.prompt._common import cut, open_judge
from effbench.methods.prompt._lingua import compress_stream, split
from effbench.methods.prompt.longllmlingua import RESTRICT, LongLLMLingua, arrange, measure_question, solve_rate
from effbench.nn.run import ModelRun

ROWS = [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / "contexts.jsonl").open()]
STEADY = {"instruction": 1.0, "question": 1.0, "dynamic": 0.0}


def write(number: int) -> Segments:
    row = ROWS[number]
    return Segments("", row["instruction"] + " ", tuple(text + " " for text in row["contexts"]), row["question"])


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).eval()


def surprisal(model: Any, ids: list[int], first: int) -> list[float]:
    """-ln p of tokens from place `first` on."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(logits[i - 1, ids[i]]) for i in range(first, len(ids))]


def encode(run: ModelRun, text: str) -> list[int]:
    ids: list[int] = run.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("restrict", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_documents_are_ranked_by_the_question_behind_them(
    number: int, restrict: bool, run: ModelRun, model: Any
) -> None:
    """And not by the documents behind the question, nor by the document alone."""
    prompt, judge = write(number), open_judge(run, "reference")
    _, contexts, _ = split(prompt, cut(prompt, judge.tokenizer))
    asked = prompt.question + RESTRICT * restrict
    found = measure_question(judge, contexts, asked)
    wanted = encode(run, asked)
    documents = [[token for piece in context for token in piece.ids] for context in contexts]
    theirs = [surprisal(model, [0, *ids, *wanted], 1 + len(ids)) for ids in documents]
    assert [*found.values()] == pytest.approx([sum(row) / len(row) for row in theirs], abs=1e-4)
    best = sorted(found, key=found.__getitem__)
    total = sum(map(len, documents)) + len(encode(run, prompt.instruction + prompt.question))
    one = LongLLMLingua(keep=(20 + 2 + 3) / total, restrict=restrict, **STEADY).rewrite(
        prompt, run
    )  # 40 tokens are looked at
    source = prompt.contexts[best[0]].split()
    assert all(any(word.strip(".") in other for other in source) for word in one.contexts[0].split())


def test_contrast_is_what_the_question_takes_away_from_the_loss(run: ModelRun, model: Any) -> None:
    """s_i = ln p(x_i | question, x_<i) - ln p(x_i | x_<i): the largest stay, behind the same kept text."""
    prompt, judge = write(0), open_judge(run, "reference")
    _, (context, *_), _ = split(prompt, cut(prompt, judge.tokenizer))
    ids = [token for piece in context for token in piece.ids]
    asked = encode(run, prompt.question + "\n\n")
    prefix = encode(run, "The rope")
    alone = surprisal(model, [0, *prefix, *ids], 1 + len(prefix))
    behind = surprisal(model, [0, *asked, *prefix, *ids], 1 + len(asked) + len(prefix))
    contrast = [own - with_question for own, with_question in zip(alone, behind, strict=True)]
    number = int(0.25 * len(ids) + 0.5)
    best = sorted(sorted(range(len(ids)), key=lambda i: -contrast[i])[:number])
    kept = compress_stream(judge, prefix, context, 0.25, 200, set(), asked)
    places = [i for i, piece in enumerate(context) for _ in piece.ids if piece in kept and not piece.stays]
    assert places == [i for i in best if not context[i].stays]
    worst = sorted(range(len(ids)), key=lambda i: contrast[i])[:number]
    assert not set(places) & set(worst)  # with the sign turned


def test_rates_fall_with_the_rank_and_meet_the_budget() -> None:
    assert solve_rate([(10, 0.3), (10, 0.0), (10, -0.3)], 15.0) == pytest.approx(0.5)
    tau = solve_rate([(10, 0.3), (10, 0.0), (10, -0.3)], 24.0)  # the first is whole
    assert 10 + 10 * tau + 10 * (tau - 0.3) == pytest.approx(24) and tau > 0.7
    assert solve_rate([(10, 0.3), (10, -0.3)], 2.0) == pytest.approx(-0.1)  # the last is gone


def test_rates_of_documents(run: ModelRun) -> None:
    """All are looked at; documents of the same length keep 0.5 + 0.3, 0.5 + 0.1 and so on of their tokens by rank."""
    prompt = write(0)
    spread = LongLLMLingua(keep=0.6, instruction=1.0, question=1.0, reorder=False)
    even = LongLLMLingua(keep=0.6, reorder=False, **STEADY)
    sizes = [len(encode(run, text)) for text in prompt.contexts]
    shares, same = (
        [len(encode(run, text)) / size for text, size in zip(method.rewrite(prompt, run).contexts, sizes, strict=True)]
        for method in (spread, even)
    )
    judge = open_judge(run, "reference")
    _, contexts, _ = split(prompt, cut(prompt, judge.tokenizer))
    found = measure_question(judge, contexts, prompt.question + RESTRICT)
    order = sorted(found, key=found.__getitem__)
    assert shares[order[0]] > shares[order[2]] > shares[order[4]]
    assert shares[order[0]] - shares[order[4]] == pytest.approx(0.6, abs=0.15)
    assert max(same) - min(same) < 0.15


def test_the_best_document_comes_first(run: ModelRun) -> None:
    prompt = write(2)
    moved, left = (LongLLMLingua(keep=0.6, reorder=reorder).rewrite(prompt, run) for reorder in (True, False))
    judge = open_judge(run, "reference")
    _, contexts, _ = split(prompt, cut(prompt, judge.tokenizer))
    found = measure_question(judge, contexts, prompt.question + RESTRICT)
    order = sorted(found, key=found.__getitem__)
    assert order != sorted(order)

    def source(text: str) -> int:
        return max(range(5), key=lambda i: len(set(text.split()) & set(prompt.contexts[i].split())))

    assert [source(text) for text in moved.contexts] == order[: len(moved.contexts)]
    assert [source(text) for text in left.contexts] == sorted(order[: len(left.contexts)])


def test_white_space_between_documents_stays_where_it_was() -> None:
    prompt = Segments(contexts=("A b.\n\n", "C d. ", "E f.\n"), question="?")
    assert arrange(prompt, [2, 0, 1]).contexts == ("E f.\n\n", "A b. ", "C d.\n")
    assert arrange(prompt, [0, 2]).contexts == ("A b.\n\n", "E f.\n")


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_the_prompt_meets_its_budget(keep: float, run: ModelRun) -> None:
    before = after = 0
    for number in range(6):
        prompt = write(number)
        before += len(encode(run, prompt.text()))
        after += len(encode(run, LongLLMLingua(keep=keep).rewrite(prompt, run).text()))
    assert after / before == pytest.approx(keep, abs=0.05)


def test_bad_settings(run: ModelRun) -> None:
    for settings in ({"dynamic": 1.5}, {"question": 0.0}, {"step": 0}, {"force": True, "tail": "package"}):
        with pytest.raises(Usage):
            LongLLMLingua(**settings)
    with pytest.raises(Refused, match="instruction and question alone"):
        LongLLMLingua(keep=0.01).rewrite(write(0), run)
