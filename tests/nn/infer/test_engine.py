"""The engine: plain generation is transformers' own, and what is scored does not depend on its company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys_cache import ARCHITECTURES, logprobs, run_of, text

from effbench.checks import toy_run
from effbench.nn.infer.cache import SlotCache
from effbench.nn.infer.engine import Engine, open_engine

STEPS = ["", "h2o(keep=0.4)", "kivi(group=8,residual=8)", "streaming_llm(sinks=2,window=9)", "sliding_window(window=8)"]
LENGTHS = (30, 12, 3, 1)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and tokens of every forward pass."""
    seen: list[tuple[int, int]] = []
    original = Engine.extend

    def counted(self: Engine, state: Any, ids: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((ids.shape[0], ids.shape[1]))
        return original(self, state, ids, *rest, **options)

    monkeypatch.setattr(Engine, "extend", counted)
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_generation_equals_transformers_token_for_token(architecture):
    """A batch padded on the left, and each prompt alone."""
    run, prompts = toy_run(architecture), [text(n, seed=n) for n in LENGTHS]
    width = max(LENGTHS)
    padded = torch.tensor([[run.pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": -1, "pad_token_id": run.pad}
    with torch.no_grad():
        whole = run.model.generate(padded, attention_mask=mask, **options)[:, width:].tolist()
    assert open_engine(run).generate(prompts, 24, set()) == whole
    assert [open_engine(run).generate([prompt], 24, set())[0] for prompt in prompts] == whole


@pytest.mark.parametrize("steps", STEPS)
def test_generation_ends_before_its_first_stop_token(steps):
    engine, prompts = open_engine(run_of(steps)), [text(n, seed=n) for n in LENGTHS]
    whole = engine.generate(prompts, 16, set())
    stop = whole[0][5]
    cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in whole]
    assert engine.generate(prompts, 16, {stop}) == cut and len(cut[0]) <= 5


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("hold", [None, 1, 5])
def test_what_generation_chooses_is_what_scoring_calls_likeliest(steps, hold):
    """A text of its own is greedy, and one that differs in a token is not, whatever is held back."""
    run, prompts = run_of(steps), [text(n, seed=n) for n in (30, 12, 8)]
    held = None if hold is None else [hold] * 3
    made = open_engine(run).generate(prompts, 6, set(), hold=held)
    other = [[*tokens[:-1], (tokens[-1] + 1) % 96] for tokens in made]
    pairs = [*zip(prompts, made, strict=True), *zip(prompts, other, strict=True)]
    found = open_engine(run).score(pairs, block=1, hold=None if held is None else held * 2)
    assert [scored.greedy for scored in found] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("steps", STEPS[1:])
def test_choices_of_one_context_share_its_prefill(steps, passes):
    """Four choices of one token are read in the two passes of their context, one row for each context."""
    contexts = [text(30), text(12, seed=1)]
    engine = open_engine(run_of(steps))
    pairs = [(context, [choice]) for context in contexts for choice in (3, 4, 5, 6)]
    together = [scored.logprob for scored in engine.score(pairs)]
    assert passes == [(2, 29), (2, 1)]
    assert len(engine.uses) == len(pairs)
    apart = [engine.score([pair])[0].logprob for pair in pairs]
    assert together == pytest.approx(apart, abs=1e-5)


@pytest.mark.parametrize("steps", STEPS[1:])
def test_choices_part_where_they_differ(steps, passes):
    """Choices of several tokens equal each fed alone; there is a row for each that differs before its last token."""
    contexts = [text(30), text(12, seed=1)]
    choices = [[3, 4, 5], [3, 4, 6], [3, 9], [7, 8, 9, 10], [7]]
    engine = open_engine(run_of(steps))
    pairs = [(context, choice) for context in contexts for choice in choices]
    together = engine.score(pairs)
    assert passes == [(2, 29), (2, 1), *[(8, 1)] * 3]  # of a context: [], [3], [3, 4] and [7, 8, 9]
    for pair, scored in zip(pairs, together, strict=True):
        assert scored.token_logprobs == pytest.approx(engine.score([pair])[0].token_logprobs, abs=1e-5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("size", [1, 40, 10_000])
def test_scores_do_not_depend_on_the_batch_or_the_order(steps, size):
    pairs = [(text(n, seed=n), text(1 + n % 3, seed=n)) for n in (30, 12, 3, 1, 30, 22)]
    run = run_of(steps)
    whole = [scored.logprob for scored in open_engine(run).score(pairs)]
    found = [scored.logprob for scored in open_engine(run).score(pairs[::-1], batch_tokens=size)]
    assert found[::-1] == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_the_whole_text_in_one_pass(architecture):
    run, pairs = toy_run(architecture), [(text(n, seed=n), text(5, seed=n)) for n in LENGTHS]
    expected = []
    for context, more in pairs:
        with torch.no_grad():
            logits = run.model(torch.tensor([context + more])).logits[0, len(context) - 1 : -1]
        expected += logits.log_softmax(-1)[range(5), more].tolist()
    for block in (None, 1, 3):
        assert logprobs(run, pairs, block=block) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("steps", STEPS)
def test_predicted_logits_are_those_that_are_scored(steps):
    run, pairs = run_of(steps), [(text(n, seed=n), text(5, seed=n)) for n in LENGTHS]
    engine = open_engine(run)
    for (_, more), logits, scored in zip(pairs, engine.predict(pairs), engine.score(pairs, block=1), strict=True):
        assert logits.log_softmax(-1)[range(5), more].tolist() == pytest.approx(scored.token_logprobs, abs=1e-5)


@pytest.mark.parametrize("steps", STEPS[1:])
def test_what_is_held_back_is_read_from_what_has_settled(steps):
    """The context but for its last tokens settles, then those come in one pass; each row holds back its own number."""
    run, ids, more = run_of(steps), text(30), text(3, seed=1)
    engine, cache, expected = open_engine(run), SlotCache(2, run.infer), []
    for number, part in enumerate((ids[:24], ids[24:], more[:1], more[1:2])):
        logits = engine.forward(torch.tensor([part]), cache).logits[0, -1]
        cache.settle(ends_prompt=number == 0)
        expected.append(logits.log_softmax(-1))
    expected = [float(values[token]) for values, token in zip(expected[1:], more, strict=True)]
    pairs = [(text(9), [5]), (ids, more), (text(40), [5, 6])]
    found = engine.score(pairs, hold=[2, 6, 1])[1].token_logprobs
    assert found == pytest.approx(expected, abs=1e-5)
    assert engine.score(pairs)[1].token_logprobs != pytest.approx(expected, abs=1e-5) or "sliding" in steps


@pytest.mark.parametrize("steps", STEPS[1:])
def test_no_more_is_held_back_than_there_is(steps):
    """A context that is shorter than what is to be held back is read in one pass."""
    run = run_of(steps)
    found = [logprobs(run, [(text(12), [3, 4]), (text(30), [5])], hold=[hold, 4]) for hold in (12, 15)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


# ---- embeddings in the place of ids ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steps", ["", "h2o(keep=0.4)", "sliding_window(window=8)", "kivi(group=8,residual=8)"])
def test_embeddings_stand_for_their_ids(steps, architecture):
    """Some or all tokens of a prompt as embeddings, in a batch of unlike lengths, scored and generated from."""
    run = run_of(steps, architecture)
    table = run.model.get_input_embeddings().weight.detach()
    pairs = [(text(n, seed=n), text(4, seed=n)) for n in LENGTHS]
    mixed = [
        ([table[t] if (i + n) % 3 else t for i, t in enumerate(context)], more)
        for n, (context, more) in enumerate(pairs)
    ]
    ids, embedded = open_engine(run).score(pairs, block=1), open_engine(run).score(mixed)
    assert [s.logprob for s in embedded] == pytest.approx([s.logprob for s in ids], abs=1e-5)
    made = [open_engine(run).generate([context for context, _ in each], 10, set()) for each in (pairs, mixed)]
    assert made[0] == made[1]
    assert open_engine(run).generate([mixed[1][0]], 10, set())[0] == made[0][1]


def test_contexts_of_unlike_embeddings_are_not_taken_for_one():
    run = run_of("h2o(keep=0.4)")
    table = run.model.get_input_embeddings().weight.detach()
    pairs = [([table[t] for t in text(12, seed=n)], [5]) for n in (0, 1)]
    found = [scored.logprob for scored in open_engine(run).score(pairs)]
    assert found == pytest.approx(logprobs(run, [(text(12, seed=n), [5]) for n in (0, 1)]), abs=1e-5)
    assert found[0] != pytest.approx(found[1], abs=1e-3)


# ---- soft prompts and prefixes under caches that settle ----


@pytest.mark.parametrize("steps", ["prompt_tuning(length=5)", "prefix_tuning(length=5)"])
@pytest.mark.parametrize("cache", ["h2o(budget=1000)", "kivi(bits=16)", "sliding_window(window=1000)"])
def test_what_stands_in_front_stays_under_a_cache_that_settles(steps, cache):
    """Scores and texts are those without the cache's method, alone and with padding."""
    plain, run = run_of(steps), run_of(f"{steps}, {cache}")
    pairs = [(text(n, seed=n), text(4, seed=n)) for n in LENGTHS]
    assert logprobs(run, pairs) == pytest.approx(logprobs(plain, pairs), abs=1e-5)
    prompts = [context for context, _ in pairs]
    assert open_engine(run).generate(prompts, 12, set()) == open_engine(plain).generate(prompts, 12, set())
