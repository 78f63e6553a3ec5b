"""Fewer tokens in fewer bits: a token is encoded once, evicted by a mark, and its unit goes when all of it has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor
from toys_cache import GROUPED, Form, HeavyHitters, Rule, Sinks, Votes, compare, round_range, run_of

WIDTH = 32  # of a head
NUMBER = 4  # bytes


def form(bits: int | str, per: str, unit: int = 1, flush: int = 0, retain: int = 0) -> Form:
    """Tokens, their groups of eight channels, channels of `unit` tokens, or all of these, with a scale each."""
    split = {"token": (1, WIDTH), "group": (WIDTH // 8, 8), "channel": (WIDTH, unit), "head": (1, unit * WIDTH)}
    groups, size = split[per]
    words = -(-size * (8 if bits == "fp8" else int(bits)) // 32)
    nbytes = groups * (4 * words + NUMBER * (1 if bits == "fp8" else 2))
    dims = {"token": (1,), "group": (2,), "channel": (0,), "head": (0, 1)}[per]

    def round_unit(held: Tensor) -> Tensor:
        x = held.unflatten(1, (-1, 8)) if per == "group" else held
        return round_range(x, dims, bits).view_as(held)

    return Form(round_unit, unit, flush or unit, retain, nbytes)


KIVI = (form(2, "channel", 8, 16), form(2, "group", retain=16))
CASES: dict[str, tuple[Callable[..., Rule], tuple[Form, Form]]] = {
    "h2o(budget=12), kv_quant(key_bits=8,value_bits=4)": (
        lambda *forms: HeavyHitters(None, 12, 0.5, *forms),
        (form(8, "token"), form(4, "token")),
    ),
    "h2o(budget=12), kv_quant(key_bits=4,value_bits=2,per='channel',group=4)": (
        lambda *forms: HeavyHitters(None, 12, 0.5, *forms),
        (form(4, "channel", 4), form(2, "channel", 4)),
    ),
    "h2o(budget=20), kivi(group=8,residual=16)": (lambda *forms: HeavyHitters(None, 20, 0.5, *forms), KIVI),
    "snapkv(budget=14,window=4), kivi(group=8,residual=16)": (lambda *forms: Votes(14, 4, 5, *forms), KIVI),
    "snapkv(budget=14,window=4), kv_quant(key_bits='fp8',value_bits='fp8',per='head',group=4,residual=3)": (
        lambda *forms: Votes(14, 4, 5, *forms),
        (form("fp8", "head", 4, retain=3), form("fp8", "head", 4, retain=3)),
    ),
    "streaming_llm(sinks=2,window=18), kivi(group=8,residual=16)": (lambda *forms: Sinks(2, 18, *forms), KIVI),
    "streaming_llm(sinks=3,window=9), kv_quant(key_bits=4,value_bits=8,per='channel',group=4)": (
        lambda *forms: Sinks(3, 9, *forms),
        (form(4, "channel", 4), form(8, "channel", 4)),
    ),
}


@pytest.mark.parametrize("steps", CASES)
@pytest.mark.parametrize("shape", [{}, GROUPED], ids=["heads", "groups"])
def test_tokens_are_encoded_once_and_evicted_by_a_mark_or_with_their_unit(steps, shape):
    """All logits, what each head holds and the bytes, against lists in float64: prompt of 24 tokens and 30 more."""
    make, forms = CASES[steps]
    rules = [make(*forms) for _ in range(2)]
    cache = compare(run_of(steps, **shape), 25, 55, rules, exact=1e-4)
    observes = NUMBER if "h2o" in steps else 0
    marked = 0
    for layer, rule in zip(cache.slot_layers, rules, strict=True):
        held = sum(map(len, rule.slots))
        dead = held - int(rule.alive.sum())
        marked += dead
        expected = held * (4 + observes + (1 if dead else 0))  # where a token stands, what it received, its mark
        for which, each in enumerate(forms):
            units = sum(counts[which] for counts in rule.units)
            assert units
            expected += units * each.nbytes + (held - units * each.unit) * WIDTH * NUMBER
        assert layer.nbytes().tolist() == [expected]
    # snapkv evicts before anything is encoded
    assert bool(marked) == ("snapkv" not in steps and any(each.unit > 1 for each in forms))
