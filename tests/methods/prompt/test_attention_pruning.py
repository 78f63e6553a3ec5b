"""Attention received by explicit attention of plain transformers, and what of a prompt stays."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from effbench import tiny
from effbench.checks import TOYS, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.views import Segments
from effbench.methods.prompt import attention_pruning
from effbench.methods.prompt._common import COMMON, WORD, Judge, open_judge
from effbench.methods.prompt.attention_pruning import AttentionPruning
from effbench.nn.kinds.prompt import rewrite
from effbench.nn.model import attention
from effbench.nn.run import ModelRun

NEEDLES = [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / "needle_256.jsonl").open()]
BEFORE, IDS, BEHIND = [1, 2, 3], [*range(10, 40), *range(20, 35)], [5, 6, 7, 8]


def attend(model: Any, ids: list[int]) -> torch.Tensor:
    """Weights [layers, heads, T, T], all at once."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        out = plain(torch.tensor([ids]), output_attentions=True)
    return torch.cat(out.attentions).double()


@pytest.mark.parametrize("architecture", TOYS)
def test_attention_received_is_the_mean_of_explicit_weights(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERIES", 16)
    run = toy_run(architecture)
    weights = attend(run.reference, BEFORE + IDS + BEHIND)
    place = slice(len(BEFORE), len(BEFORE) + len(IDS))
    for queries, rows in (("question", slice(-len(BEHIND), None)), ("all", slice(None))):
        found = AttentionPruning(queries=queries).observe(open_judge(run, "reference"), BEFORE, IDS, BEHIND)
        expected = weights[:, :, rows].mean((0, 1, 2))[place]
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-7), architecture
        assert expected.std() > 1e-4 * expected.mean()


def test_no_more_than_a_block_of_weights_is_made(run: ModelRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERIES", 8)
    rows: list[int] = []
    real = attention._attend_in_parts

    def count(query: Any, key: Any, value: Any, mask: Any, scaling: float, tell: Any) -> Any:
        return real(
            query, key, value, mask, scaling, lambda part, more: (rows.append(part.shape[3]), tell(part, more)), 8
        )

    monkeypatch.setattr(attention, "_attend_in_parts", count)
    AttentionPruning().observe(open_judge(run, "reference"), BEFORE, IDS, BEHIND)
    assert rows and max(rows) == 8


def divide(row: dict[str, Any]) -> Segments:
    return Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)


@pytest.mark.parametrize("queries", ["question", "all"])
def test_tokens_that_receive_most_stay_in_their_order(
    queries: Any, run: ModelRun, of_contexts: Callable[[Segments, float], float]
) -> None:
    row = NEEDLES[0]
    front, context, question = (
        run.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (row["instruction"], " " + row["context"], " " + row["question"])
    )
    weights = attend(run.reference, [run.tokenizer.bos_token_id, *front, *context, *question])
    rows = slice(-len(question), None) if queries == "question" else slice(None)
    received = weights[:, :, rows].mean((0, 1, 2))[1 + len(front) :][: len(context)]
    for keep in (0.25, 0.5):
        best = sorted(received.topk(int(keep * len(context))).indices.tolist())
        prompt = divide(row)
        new = AttentionPruning(keep=of_contexts(prompt, keep), queries=queries).rewrite(prompt, run)
        assert "".join("".join(new.contexts).split()) == "".join(
            run.tokenizer.decode([context[i]]).strip() for i in best
        )
        assert (new.instruction.strip(), new.question) == (row["instruction"], row["question"])


def test_numbers_and_names_are_whole_words_of_the_source(run: ModelRun) -> None:
    """Over 100 contexts: all forced words stay, and no other number or name comes about."""
    method = AttentionPruning(keep=0.3, force=True)
    for i, row in enumerate(NEEDLES[:100]):
        context = f"In {1900 + i} ({row['context'][:200]}) Smith-Jones of McDonaldville saw 3.5% of A4{i}, {i} zisks. "
        prompt = Segments("", "Notes: ", (context, context.replace("In", "By")), row["question"])
        new = method.rewrite(prompt, run)
        named = lambda text: {  # noqa: E731
            word for word in WORD.findall(text) if not word.islower() and word.lower() not in COMMON
        }
        assert named(new.text()) <= set(WORD.findall(prompt.text()))
        assert named(context) <= named(new.contexts[0]) and len(new.text()) < len(prompt.text())


def test_long_contexts_are_read_in_chunks(run: ModelRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each between what stands before all of them and the question."""

    class Short(Judge):
        window = 60

    real = attention_pruning.open_judge
    monkeypatch.setattr(
        attention_pruning, "open_judge", lambda told, name: Short(run.tokenizer, real(told, name).engine)
    )
    asked: list[Any] = []
    observe = AttentionPruning.observe
    monkeypatch.setattr(AttentionPruning, "observe", lambda self, *told: asked.append(told[1:]) or observe(self, *told))
    told: Any = SimpleNamespace(
        tokenizer=run.tokenizer, role=run.role, tokenizer_of=run.tokenizer_of, pad=run.pad, progress=run.progress
    )
    told.log = SimpleNamespace(notes={})
    prompt = divide(NEEDLES[0])
    new = AttentionPruning().rewrite(prompt, told)
    total = len(run.tokenizer("".join(prompt.contexts))["input_ids"])
    assert abs(len(run.tokenizer(new.contexts[0])["input_ids"]) - total // 2) < 4
    assert len(asked) == told.log.notes["chunks"]["attention_pruning"] > 3
    assert all(len(before) + len(ids) + len(behind) <= 60 for before, ids, behind in asked)
    assert {run.tokenizer.decode(behind).strip() for _, _, behind in asked} == {prompt.question}
    Short.window = 5
    with pytest.raises(Unsupported, match="leave no room in 5 positions"):
        AttentionPruning().rewrite(prompt, told)


def test_prompts_and_settings_that_it_cannot_take(run: ModelRun) -> None:
    with pytest.raises(Unsupported, match="reads the question"):
        rewrite(run, AttentionPruning(), Segments(contexts=("The code krox",), whole=True))
    for settings in ({"queries": "last"}, {"keep": 0.0}):
        with pytest.raises(Usage):
            AttentionPruning(**settings)
