"""Caches that evict and encode: padding, chunks, copies and what is taken back leave no trace."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from toys_cache import ARCHITECTURES, fill, kept, logprobs, run_of, text

from effbench.checks import toy_run
from effbench.core.errors import Unsupported
from effbench.core.recipe import parse
from effbench.core.registry import load
from effbench.nn.infer.cache import SlotCache
from effbench.nn.infer.engine import Engine, State, open_engine
from effbench.nn.run import ModelRun

METHODS = [
    "h2o(keep=0.3)",
    "snapkv(keep=0.4,window=4)",
    "random_eviction(keep=0.4)",
    "streaming_llm(sinks=2,window=9)",
    "sliding_window(window=8)",
    "kv_quant(key_bits=4,value_bits=4)",
    "kv_quant(key_bits=2,value_bits=4,per='group',group=16,residual=3)",
    "kv_quant(key_bits=2,value_bits=2,per='channel',group=8)",
    "kv_quant(key_bits='fp8',value_bits='fp8',per='head',group=8)",
    "kivi(group=8,residual=8)",
    "h2o(keep=0.6), kivi(group=8,residual=8)",
    "snapkv(keep=0.6,window=4), kv_quant(key_bits=2,value_bits=2,per='head',group=4)",
    "streaming_llm(sinks=2,window=9), kivi(group=4,residual=4)",
    "sliding_window(window=9), h2o(budget=7), kv_quant(key_bits='fp8',value_bits=2)",
]


def supported(steps: str, architecture: str, **shape: Any) -> ModelRun:
    """A run; the test is over where the method says that it does not support the architecture."""
    try:
        return run_of(steps, architecture, **shape)
    except Unsupported:
        assert "streaming_llm" in steps and architecture in ("opt", "gpt2")
        pytest.skip("unsupported")


# ---- padding ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steps", METHODS)
def test_padding_leaves_no_trace(steps, architecture):
    """A text's log-probabilities are those it has alone, whatever longer row it is batched with."""
    run = supported(steps, architecture)
    pair, others = (text(21), text(3, seed=1)), [text(21 + pads, seed=2) for pads in (0, 5, 16, 200)]
    alone = logprobs(run, [pair])
    for other in others:
        assert logprobs(run, [(other, [7]), pair])[-3:] == pytest.approx(alone, abs=1e-5)
    more = [(text(n, seed=n), text(1 + n % 4, seed=n)) for n in (3, 1, 40, 8)]  # continuations of unlike lengths, too
    assert logprobs(run, [pair, *more])[:3] == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("steps", METHODS)
def test_padding_leaves_no_trace_in_generation(steps):
    run = run_of(steps, "qwen3")
    prompts = [text(n, seed=n) for n in (30, 12, 3, 1)]
    alone = [open_engine(run).generate([prompt], 12, set())[0] for prompt in prompts]
    assert open_engine(run).generate(prompts, 12, set()) == alone


# ---- what a cache holds does not depend on how it came in ----


@pytest.mark.parametrize("steps", METHODS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_prompt_in_chunks_leaves_the_same_slots(steps, size):
    """Places are equal, and mass, keys and values to 1e-5; with padding in front of one of two rows."""
    run = run_of(steps, "mistral")
    rows = [text(41), [0] * 12 + text(29, seed=1)]
    real = torch.tensor([[True] * 41, [False] * 12 + [True] * 29])

    def read(chunk: int) -> SlotCache:
        engine, state = open_engine(run), State(SlotCache(2, run.infer))
        for start in range(0, 41, chunk):
            part = slice(start, start + chunk)
            engine.extend(state, torch.tensor(rows)[:, part], real[:, part])
        state.cache.settle(ends_prompt=True)
        return state.cache

    for whole, parts in zip(read(41).slot_layers, read(size).slot_layers, strict=True):
        assert (whole.place is None) == (parts.place is None)
        if whole.place is not None:
            assert torch.equal(whole.place, parts.place)
        held = torch.as_tensor(whole.held()).tolist(), torch.as_tensor(parts.held()).tolist()
        assert held[0] == held[1] and whole.nbytes().tolist() == parts.nbytes().tolist()
        if getattr(whole, "mass", None) is not None:
            torch.testing.assert_close(whole.mass, parts.mass, atol=1e-5, rtol=0)
    pairs = [(text(41), text(4)), (text(29, seed=1), text(3))]
    found = [[s.logprob for s in Engine(run.model, run.infer, chunk=chunk).score(pairs)] for chunk in (size, None)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("steps", METHODS)
def test_caches_of_one_plan_do_not_know_of_each_other(steps):
    """Two texts read in turns leave what they leave one after the other."""
    run, texts = run_of(steps), (text(50), text(44, seed=1))
    engine = open_engine(run)
    caches = [SlotCache(2, run.infer) for _ in texts]
    for cache, ids in zip(caches, texts, strict=True):
        engine.forward(torch.tensor([ids[:30]]), cache)
    for cache in caches:
        cache.settle(ends_prompt=True)
    for place in range(30, 50):
        for cache, ids in zip(caches, texts, strict=True):
            if place < len(ids):
                engine.forward(torch.tensor([[ids[place]]]), cache)
                cache.settle()
    for cache, ids in zip(caches, texts, strict=True):
        same(cache, fill(run, ids, 30))


def same(first: SlotCache, second: SlotCache) -> None:
    """Two caches hold the same."""
    assert first.nbytes().tolist() == second.nbytes().tolist() and first.kept().tolist() == second.kept().tolist()
    for one, other in zip(first.slot_layers, second.slot_layers, strict=True):
        assert torch.equal(torch.as_tensor(one.seen), torch.as_tensor(other.seen))
        states = [layer.stores if hasattr(layer, "stores") else (layer.keys, layer.values) for layer in (one, other)]
        for a, b in zip(*states, strict=True):
            pair = (a, b) if isinstance(a, torch.Tensor) else (a.decode(), b.decode())
            torch.testing.assert_close(*pair, atol=1e-6, rtol=0)
        if one.place is not None and other.place is not None:
            assert torch.equal(one.place, other.place)
        if getattr(one, "mass", None) is not None:
            torch.testing.assert_close(one.mass, other.mass, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", METHODS)
def test_a_copy_lives_by_itself(steps):
    """What is put into a selection of rows leaves the cache it was taken from as it was, and the other way round."""
    run = run_of(steps, "mistral")
    engine, cache = open_engine(run), fill(run, text(40), 36)
    untouched = fill(run, text(40), 36)
    copies = cache.select(torch.tensor([0, 0]))
    more = text(9, seed=5)
    for token in more:
        engine.forward(torch.tensor([[token], [token]]), copies)
        copies.settle()
    same(cache, untouched)
    for token in more:
        engine.forward(torch.tensor([[token]]), cache)
        cache.settle()
    for row in (0, 1):
        same(copies.select(torch.tensor([row])), cache)


@pytest.mark.parametrize("steps", METHODS)
def test_the_shorter_of_two_rows_can_be_selected_alone(steps):
    """And goes on as if it had never had company."""
    run = run_of(steps, "mistral")
    short, long = text(19), text(45, seed=1)
    engine, state = open_engine(run), State(SlotCache(2, run.infer))
    real = torch.tensor([[True] * 45, [False] * 26 + [True] * 19])
    engine.extend(state, torch.tensor([long, [0] * 26 + short]), real)
    state.cache.settle(ends_prompt=True)
    cache, alone = state.cache.select(torch.tensor([1])), fill(run, short, 19)
    assert cache.kept().tolist() == alone.kept().tolist() and cache.changed().tolist() == alone.changed().tolist()
    for token in text(12, seed=3):
        logits = [engine.forward(torch.tensor([[token]]), each).logits for each in (cache, alone)]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
        cache.settle()
        alone.settle()


# ---- tokens that are taken back ----


@pytest.mark.parametrize("steps", [*METHODS, "h2o(keep=0.3,recent=0.0)"])
@pytest.mark.parametrize("drafts", [1, 4])
def test_unsettled_tokens_can_be_taken_back(steps, drafts):
    """Rejected drafts leave no trace: neither slots, nor bytes, nor what follows."""
    run = run_of(steps, "mistral")
    cache, plain = fill(run, text(40), 36), fill(run, text(41), 36)
    engine = open_engine(run)
    engine.forward(torch.tensor([[*text(41)[40:], *text(drafts, seed=9)]]), cache)
    for token in text(2, seed=8):
        engine.forward(torch.tensor([[token]]), cache)
    for count in (1, drafts + 1):
        cache.crop(-count)
    cache.settle()
    same(cache, plain)
    for token in text(9, seed=4):
        logits = [engine.forward(torch.tensor([[token]]), each).logits for each in (cache, plain)]
        torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
        cache.settle()
        plain.settle()
    assert cache.get_seq_length() == plain.get_seq_length() == 50


def test_settled_tokens_of_slots_can_be_taken_back_where_nothing_was_evicted():
    run = run_of("kivi(group=8,residual=8)")
    cache, plain = fill(run, text(40), 36), fill(run, text(34), 34)
    cache.crop(-6)
    assert kept(cache.slot_layers[0]) == kept(plain.slot_layers[0]) == [list(range(34))] * 4
    assert cache.get_seq_length() == 34 and cache.slot_layers[0].held().tolist() == [34]


# ---- settings at which nothing changes ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "key", ["h2o", "snapkv", "random_eviction", "streaming_llm", "sliding_window", "kv_quant", "kivi"]
)
def test_identity_settings_equal_plain(key, architecture):
    """Log-probabilities to 1e-4 of their size at the same block size, and generation token for token."""
    identity = ",".join(f"{name}={value}" for name, value in load(key).identity.items())
    by_token, by_block, made = behave(supported(f"{key}({identity})", architecture))
    plain = plainly(architecture)
    assert by_token == pytest.approx(plain[0], rel=1e-4) and by_block == pytest.approx(plain[1], rel=1e-4)
    assert made == plain[2]


def behave(run: ModelRun) -> tuple[list[float], list[float], list[list[int]]]:
    """Log-probabilities by one token and by four at a time, and greedy texts."""
    pairs, engine = [(text(n, seed=n), text(5, seed=n)) for n in (30, 12, 1)], open_engine(run)
    made = engine.generate([context for context, _ in pairs], 10, set())
    assert not any(use.changed for use in engine.uses)
    return logprobs(run, pairs, block=1), logprobs(run, pairs, block=4), made


@functools.cache
def plainly(architecture: str) -> tuple[list[float], list[float], list[list[int]]]:
    """Of the toy under no method."""
    return behave(toy_run(architecture))


@pytest.mark.parametrize("steps", METHODS)
def test_what_was_changed_is_noted(steps):
    """Each scored continuation says whether it was read from less than everything, and from how much."""
    run = run_of(steps)
    engine = open_engine(run)
    engine.score([(text(60), text(3))])
    (use,) = engine.uses
    cache = fill(run, text(60) + text(3)[:1], 59)  # the last token of the three is read from this
    assert use == (True, pytest.approx(float(cache.kept())), int(cache.nbytes()), 61)
    assert (use.kept < 1) == any(method.evicts or method.reach for method in run.infer.methods)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("steps", METHODS)
def test_more_tokens_than_positions_are_unsupported(steps, architecture):
    """However few of them are held, unless positions are those inside of the cache."""
    run = supported(steps, architecture, max_position_embeddings=32)
    engine = open_engine(run)
    assert len(engine.generate([text(20)], 12, set())[0]) == 12
    for ask in (lambda: engine.generate([text(20)], 13, set()), lambda: engine.score([(text(20), text(14))])):
        if "streaming_llm" in steps:
            assert ask()
            continue
        with pytest.raises(Unsupported, match="33 tokens in 32 positions"):
            ask()


def test_methods_evict_in_the_order_of_the_recipe():
    """The second sees what the first has left."""
    run = toy_run()
    for step in parse("snapkv(budget=20,window=4), random_eviction(budget=10)").steps:
        run.apply(step)
    first = run_of("snapkv(budget=20,window=4)")
    for both, one in zip(fill(run, text(40), 40).slot_layers, fill(first, text(40), 40).slot_layers, strict=True):
        for left, before in zip(kept(both), kept(one), strict=True):
            assert len(left) == 10 and len(before) == 20 and set(left) < set(before)
