"""Sliding window: a rolling buffer equals dense attention under a band, however the text is cut into passes."""

from __future__ import annotations

import psutil
import pytest
import torch
from toys_cache import ARCHITECTURES, GROUPED, Rule, fill, kept, logprobs, plain_llama, run_of, text

from effbench.core.errors import Unsupported
from effbench.nn.infer.cache import RingLayer, SlotCache
from effbench.nn.infer.engine import Engine, State, open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.run import ModelRun

W = 6
LENGTH = 40


def band(run: ModelRun, ids: list[int], window: int = W) -> torch.Tensor:
    """[T, V] logits of one dense pass in which query i sees key j where 0 <= i - j < window."""
    behind = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
    mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill((behind < 0) | (behind >= window), -torch.inf)
    with torch.no_grad():
        return run.model(torch.tensor([ids]), attention_mask=mask, position_ids=torch.arange(len(ids))[None]).logits[0]


def passes(run: ModelRun, ids: list[int], cuts: list[int], pads: int, settled: bool = True) -> torch.Tensor:
    """[T, V] logits of a text in passes of so many tokens, with padding in front of the first."""
    engine, cache = open_engine(run), SlotCache(len(Blocks(run.model)), run.infer)
    state, found, start = State(cache), [], 0
    for number, cut in enumerate(cuts):
        part = [*([0] * pads if number == 0 else []), *ids[start : start + cut]]
        real = torch.tensor([[False] * (len(part) - cut) + [True] * cut]) if len(part) > cut else None
        found.append(engine.extend(state, torch.tensor([part]), real, body=False).logits[0, -cut:])
        if settled:
            cache.settle(ends_prompt=number == 0)
        start += cut
    return torch.cat(found)


def cut(length: int, size: int) -> list[int]:
    return [*[size] * (length // size), *([length % size] if length % size else [])]


SIZES = (1, 3, W - 1, W, W + 1, 2 * W + 3)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Whether log-probabilities of logits [T, V] are the same to 1e-5."""
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-5, rtol=0, check_dtype=False)


@pytest.mark.parametrize("steps", ["", ", kv_quant(key_bits=16,value_bits=16)", ", h2o(budget=1000)"])
@pytest.mark.parametrize("pads", [0, 40])
def test_every_cut_equals_the_band(pads, steps):
    """In a ring, and in slots where something else is done to the cache as well."""
    run, ids = run_of(f"sliding_window(window={W}){steps}"), text(LENGTH)
    dense = band(run, ids)
    for size in SIZES:
        for settled in (True, False):
            same(passes(run, ids, cut(LENGTH, size), pads, settled), dense)
    ragged = [3, 1, 7, 2, 13, 1, 1, 6, 6]
    same(passes(run, ids, ragged, pads), dense)


class Window(Rule):
    """Before each token all but the newest W - 1 are forgotten: with itself it sees W."""

    def settle(self, first: bool) -> None:
        self.alive[:, : max(0, self.alive.shape[1] - (W - 1))] = False


@pytest.mark.parametrize("shape", [{}, GROUPED])
@pytest.mark.parametrize("pads", [0, 40])
def test_every_cut_equals_attention_written_out(pads, shape):
    """In float64, token by token; with grouped queries, too."""
    run, ids = run_of(f"sliding_window(window={W})", **shape), text(LENGTH)
    plain = plain_llama(run.model, ids, 1, [Window() for _ in range(2)])
    for size in SIZES:
        same(passes(run, ids, cut(LENGTH, size), pads), plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_longer_than_the_window_and_what_follows_equal_the_band(architecture):
    run, ids = run_of(f"sliding_window(window={W})", architecture), text(LENGTH)
    found = Engine(run.model, run.infer).predict([(ids[:25], ids[25:])])[0]
    same(found, band(run, ids)[24:-1])


@pytest.mark.parametrize("before", [4, 5, 9, 12])
@pytest.mark.parametrize("drafts", [1, 3, W + 2])
@pytest.mark.parametrize("pads", [0, 40])
@pytest.mark.parametrize("taken", [0, 1, W])
def test_unsettled_tokens_can_be_taken_back_across_the_wrap(before, drafts, pads, taken):
    """Rejected drafts leave no trace, whatever they would have overwritten; those before them that are right stay."""
    run, ids = run_of(f"sliding_window(window={W})"), text(LENGTH)
    engine, cache = open_engine(run), SlotCache(2, run.infer)
    real = torch.tensor([[False] * pads + [True] * before]) if pads else None
    state = State(cache)
    engine.extend(state, torch.tensor([[0] * pads + ids[:before]]), real)
    cache.settle(ends_prompt=True)
    for fed in (ids[before : before + 1 + taken], text(drafts, seed=9)):  # in passes of their own
        engine.extend(state, torch.tensor([fed]))
    cache.crop(-drafts)
    cache.settle()
    after = before + 1 + taken
    found = []
    for token in ids[after:]:
        found.append(engine.forward(torch.tensor([[token]]), cache).logits[0, -1])
        cache.settle()
    same(torch.stack(found), band(run, ids)[after:])


def test_settled_tokens_cannot_be_taken_back():
    """They have taken the place of older ones."""
    run = run_of(f"sliding_window(window={W})")
    cache = SlotCache(2, run.infer)
    open_engine(run).forward(torch.tensor([text(9)]), cache)
    cache.settle()
    with pytest.raises(ValueError, match="settled"):
        cache.crop(-1)


def test_memory_does_not_grow_with_the_text():
    """The token at place p stands in slot p modulo the window, and bytes are those of the window."""
    run = run_of(f"sliding_window(window={W})")
    engine, cache, sizes = open_engine(run), SlotCache(2, run.infer), []
    for token in text(5 * W):
        engine.forward(torch.tensor([[token]]), cache)
        cache.settle()
        sizes.append(int(cache.nbytes()))
    slot = 2 * (2 * 4 * 32 * 4 + 4)  # layers, keys and values, heads, width, float32; and the place of the token
    assert sizes == [slot * min(n, W) for n in range(1, 5 * W + 1)]
    for layer in cache.slot_layers:
        assert isinstance(layer, RingLayer)
        assert [p % W for p in layer.place[0].tolist()] == list(range(W)) and min(layer.place[0]) == 4 * W


LONG = 16384
NARROW = {"layers": 1, "hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 32768} | GROUPED


def check_far(run: ModelRun, ids: list[int], logits: torch.Tensor, window: int) -> None:
    """Whether what predicts a token behind the last is what the newest tokens give where they stand; of one layer."""
    places = torch.arange(len(ids) - window, len(ids))[None]
    with torch.no_grad():
        dense = run.model(torch.tensor([ids[-window:]]), position_ids=places).logits[0, -1:]
    same(logits, dense)


@pytest.mark.parametrize("size", [61, 64, 200])
def test_memory_stays_over_16384_tokens(size):
    """In passes of many tokens; what is read far behind the window is read at its true positions."""
    window = 64
    run, ids, sizes = run_of(f"sliding_window(window={window})", **NARROW), text(LONG), []
    engine, cache = open_engine(run), SlotCache(1, run.infer)
    for start in range(0, LONG, size):
        logits = engine.forward(torch.tensor([ids[start : start + size]]), cache).logits[0, -1:]
        cache.settle(ends_prompt=not start)
        sizes.append(int(cache.nbytes()))
    assert set(sizes[1:]) == {window * (2 * 2 * 8 * 4 + 4)}  # keys and values, heads, width, float32; and the place
    check_far(run, ids, logits, window)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["sliding_window(window=64)", "streaming_llm(sinks=4,window=60)"])
def test_memory_stays_while_16384_tokens_are_generated(steps):
    """That of the cache after every token, and that of the process."""
    run, ids = run_of(steps, **NARROW), text(100)
    engine, sizes, memory = open_engine(run), set(), []
    state = engine.prefill(torch.tensor([ids]))
    for number in range(LONG):
        if number % 2048 == 0:
            memory.append(psutil.Process().memory_info().rss)
        ids.append(int(state.ids))
        state = engine.decode(state)
        sizes.add(int(state.cache.nbytes()))
    assert len(sizes) == 1 and int(state.cache.seen) == LONG + 100
    assert memory[-1] - memory[1] < 4e6
    if "sliding" in steps:
        logits = engine.forward(state.ids[:, None], state.cache).logits[0]
        check_far(run, [*ids, int(state.ids)], logits, 64)


def test_more_tokens_than_positions_are_unsupported():
    """They are the true ones, also where no more than a window is held."""
    run = run_of(f"sliding_window(window={W})", max_position_embeddings=32)
    assert len(Engine(run.model, run.infer).generate([text(20)], 12, set())[0]) == 12
    with pytest.raises(Unsupported, match="33 tokens in 32 positions"):
        Engine(run.model, run.infer).generate([text(20)], 13, set())


def test_a_draft_may_slide():
    """Its ring takes back what the verifier rejects: the text is that of the verifier."""
    run = run_of(f"sliding_window(window={W}), speculative(k=4)")
    prompts = [text(length, seed=length) for length in (3, 11, 30)]
    expected = Engine(run_of("").model, type(run.infer)()).generate(prompts, 30, set())
    assert open_engine(run).generate(prompts, 30, set()) == expected


@pytest.mark.parametrize("own", [3, 9])
def test_a_models_own_window_holds_as_well(own):
    """The nearer of the two bounds is the one that counts."""
    run, ids = run_of(f"sliding_window(window={W})", "mistral", sliding_window=own), text(LENGTH)
    found = Engine(run.model, run.infer).predict([(ids[:25], ids[25:])])[0]
    torch.testing.assert_close(found, band(run, ids, min(own, W))[24:-1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("steps", ["h2o(budget=4)", "snapkv(budget=4,window=2)"])
def test_a_models_own_window_holds_where_fewer_slots_are_held(steps):
    """Slots that are held may be further back than the window, which hides them in every batch alike."""
    run = run_of(steps, "mistral", sliding_window=6)
    pair = (text(21), text(6, seed=1))
    alone, batched = logprobs(run, [pair]), logprobs(run, [(text(60, seed=2), [7]), pair])
    assert batched[1:] == pytest.approx(alone, abs=1e-5)
    cache = fill(run, text(21), 21)
    layer = cache.slot_layers[0]
    assert any(place < 21 - 5 for places in kept(layer) for place in places)
    open_engine(run).forward(torch.tensor([[7]]), cache)
    assert torch.equal(layer.mask(6)[0, :, 0], layer.places()[0] > 21 - 6)


@pytest.mark.parametrize("steps", ["h2o(budget=100)", "kv_quant(key_bits=16,value_bits=16)", "kivi(bits=16)"])
def test_a_models_own_window_holds_under_other_methods(steps):
    run, ids = run_of(steps, "mistral", sliding_window=5), text(LENGTH)
    found = Engine(run.model, run.infer).predict([(ids[:25], ids[25:])])[0]
    torch.testing.assert_close(found, band(run, ids, 5)[24:-1], atol=2e-5, rtol=0)
