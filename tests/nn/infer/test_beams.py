"""Beam search: transformers' own token for token, exhaustive where there are beams enough, and settling caches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from toys_cache import GROUPED, run_of, text

from effbench.checks import toy_run
from effbench.core.errors import Unsupported
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.run import ModelRun

STEPS = ["", "h2o(keep=0.4)", "kivi(group=8,residual=8)", "streaming_llm(sinks=2,window=9)", "sliding_window(window=8)"]
LENGTHS = (30, 12, 3, 1)
TOYS = [("llama", {}), ("gpt2", {}), ("qwen3", GROUPED), ("mistral", {})]


def toy(architecture: str, shape: dict[str, Any], sharp: float = 3.0) -> ModelRun:
    """A toy with a head of its own, so that texts are no repetitions, and scores differ by more than rounding does."""
    run = toy_run(architecture, shape=shape)
    head = run.model.get_output_embeddings()
    weight = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
    head.weight = torch.nn.Parameter(weight * sharp / weight.shape[1] ** 0.5)
    return run


def theirs(run: ModelRun, prompts: list[list[int]], beams: int, new: int, stops: list[int], **options: Any) -> Any:
    """What transformers finds, cut before its stop token."""
    width = max(map(len, prompts))
    padded = torch.tensor([[run.pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"num_beams": beams, "do_sample": False, "early_stopping": False, **options}
    with torch.no_grad():
        found = run.model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=new,
            eos_token_id=stops or None,
            pad_token_id=run.pad,
            **options,
        )[:, width:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in stops), new) for row in found]
    return [row[:end] for row, end in zip(found, ends, strict=True)]


@pytest.mark.parametrize(("architecture", "shape"), TOYS, ids=lambda value: str(value))
@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_is_transformers_own(architecture, shape, beams):
    """A batch padded on the left and each prompt alone; without stop tokens, and with one and two that end texts."""
    run, prompts = toy(architecture, shape), [text(n, seed=n) for n in LENGTHS]
    engine = open_engine(run)
    run.model.generation_config.eos_token_id = None
    whole = theirs(run, prompts, beams, 12, [])
    assert engine.search(prompts, beams, 12, set()) == whole
    assert [engine.search([prompt], beams, 12, set())[0] for prompt in prompts] == whole
    stops = [whole[0][4], whole[1][6]]
    ended = 0
    for some, penalty in itertools.product((stops[:1], stops), (1.0, 0.0, 2.0, -1.0)):
        expected = theirs(run, prompts, beams, 12, some, length_penalty=penalty)
        assert engine.search(prompts, beams, 12, set(some), penalty) == expected
        assert [engine.search([prompt], beams, 12, set(some), penalty)[0] for prompt in prompts] == expected
        ended += sum(len(row) < 12 for row in expected)
    assert ended > 4


@pytest.mark.parametrize("penalty", [1.0, 0.0, 0.7])
@pytest.mark.parametrize("stop", [None, 2])
def test_with_beams_enough_the_search_is_exhaustive(penalty, stop):
    """All 4^3 texts of a vocabulary of four, those that end early among them, scored one by one."""
    run = toy("llama", {"vocab_size": 4}, sharp=1.0)
    engine, prompts, new = open_engine(run), [[1, 3, 2], [3], [2, 2, 1, 3, 1]], 3
    expected = []
    for prompt in prompts:
        texts: set[tuple[int, ...]] = set()
        for tokens in itertools.product(range(4), repeat=new):
            texts.add(tokens[: tokens.index(stop) + 1] if stop in tokens else tokens)
        ordered = sorted(texts)
        found = engine.score([(prompt, list(tokens)) for tokens in ordered])
        scores = [s.logprob / len(tokens) ** penalty for s, tokens in zip(found, ordered, strict=True)]
        best = ordered[max(range(len(ordered)), key=scores.__getitem__)]
        expected.append([token for token in best if token != stop])
    assert engine.search(prompts, 64, new, set() if stop is None else {stop}, penalty) == expected


@pytest.mark.parametrize("steps", STEPS)
def test_one_beam_is_greedy(steps):
    engine, prompts = open_engine(run_of(steps)), [text(n, seed=n) for n in LENGTHS]
    whole = engine.generate(prompts, 12, set())
    uses = engine.uses
    assert engine.search(prompts, 1, 12, set()) == whole
    assert engine.uses == uses
    stop = whole[0][5]
    assert engine.search(prompts, 1, 12, {stop}) == engine.generate(prompts, 12, {stop})


@pytest.mark.parametrize("steps", STEPS[1:])
def test_beams_under_a_cache_that_settles_do_not_depend_on_the_batch(steps):
    engine, prompts = open_engine(run_of(steps)), [text(n, seed=n) for n in LENGTHS]
    whole = engine.search(prompts, 3, 10, set())
    assert [engine.search([prompt], 3, 10, set())[0] for prompt in prompts] == whole
    stop = whole[0][2]
    ended = engine.search(prompts, 3, 10, {stop})
    assert [engine.search([prompt], 3, 10, {stop})[0] for prompt in prompts] == ended


@pytest.mark.parametrize("steps", ["h2o(budget=1000)", "kivi(bits=16)", "sliding_window(window=1000)"])
def test_a_cache_that_holds_everything_changes_nothing(steps):
    prompts = [text(n, seed=n) for n in LENGTHS]
    found = [open_engine(run_of(each)).search(prompts, 4, 10, set()) for each in ("", steps)]
    assert found[0] == found[1]


@pytest.mark.parametrize("steps", STEPS)
def test_each_text_is_scored_by_what_its_own_beam_holds(steps):
    """The score of the best text is the score of that text fed alone: caches follow the beams they belong to."""
    engine, prompt = open_engine(run_of(steps)), text(30)
    beams, seen = 4, []
    original = Engine.head
    engine.head = lambda states: seen.append(original(engine, states)) or seen[-1]  # type: ignore[method-assign]
    made = engine.search([prompt], beams, 8, set())[0]
    del engine.head
    alone = engine.predict([(prompt, made)])[0]
    for logits, own in zip(seen, alone, strict=True):  # of the beams that began like it, one is it
        assert min(float((row - own).abs().max()) for row in logits) < 1e-4


def test_a_decoder_searches_as_its_verifier_does():
    prompts = [text(n, seed=n) for n in LENGTHS]
    found = [open_engine(run_of(steps)).search(prompts, 3, 6, set()) for steps in ("", "rtn(bits=3), speculative(k=2)")]
    assert found[0] == found[1]


def test_searches_that_have_nothing_to_do_or_no_room():
    engine = open_engine(toy_run())
    assert engine.search([], 4, 8, set()) == []
    assert engine.search([text(3)] * 2, 4, 0, set()) == [[], []]
    with pytest.raises(Unsupported):
        engine.search([text(3)], 4, engine.max_length, set())
