"""KIVI: a hand-written float64 reference of the paper's rule, length by length."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor
from toys_cache import GROUPED, Rule, compare, fill, run_of, text

from effbench import ops
from effbench.core.views import Codec
from effbench.methods.cache.kivi import KIVI


def round_along(x: Tensor, axis: int, group: int, bits: int) -> Tensor:
    """Groups of neighbours along an axis between their least and largest numbers in 2^bits steps."""
    parts = []
    for part in x.split(group, axis):
        low, high = part.amin(axis, keepdim=True), part.amax(axis, keepdim=True)
        step = (high - low) / (2**bits - 1)
        parts.append(low + step * ((part - low) / step).round())
    return torch.cat(parts, axis) if parts else x


class Paper(Rule):
    """Section 3.3: keys per channel, `residual` at once; values per token, all but the newest `residual`."""

    def __init__(self, bits: int, group: int, residual: int) -> None:
        super().__init__()
        self.bits, self.group, self.residual = bits, group, residual
        self.settled = 0

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        n, m = self.settled // self.residual * self.residual, max(0, self.settled - self.residual)
        old_keys, old_values = keys[:, :n], values[:, :m]
        if n:
            old_keys = round_along(old_keys, 1, self.group, self.bits)
        if m:
            old_values = round_along(old_values, 2, self.group, self.bits)
        return torch.cat([old_keys, keys[:, n:]], 1), torch.cat([old_values, values[:, m:]], 1)

    def settle(self, first: bool) -> None:
        self.settled = self.alive.shape[1]


@pytest.mark.parametrize(
    ("bits", "group", "residual", "prompt", "length", "shape"),
    [
        (2, 32, 128, 100, 140, {}),
        (2, 32, 128, 140, 150, GROUPED),
        (2, 8, 8, 30, 50, {}),
        (4, 16, 32, 60, 70, GROUPED),
        (8, 8, 16, 5, 40, {}),
    ],
)
def test_logits_equal_the_papers_rule(bits, group, residual, prompt, length, shape):
    run = run_of(f"kivi(bits={bits},group={group},residual={residual})", **shape)
    compare(run, prompt, length, [Paper(bits, group, residual) for _ in range(2)], exact=1e-4)


def test_what_is_held_equals_the_papers_rule():
    """Keys and values of the cache themselves, in both layers, against the same in float64."""
    ids = text(150)
    whole, cache = fill(run_of("kivi(bits=16)", layers=1), ids, 100), fill(run_of("kivi()", layers=1), ids, 100)
    rule = Paper(2, 32, 128)
    rule.settled = 150
    (keys, values), (plain_keys, plain_values) = (
        [store.decode().double() for store in each.slot_layers[0].stores] for each in (cache, whole)
    )
    expected = rule.stored(plain_keys, plain_values)
    torch.testing.assert_close(keys, expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(values, expected[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 31, 32, 127, 128, 129, 160, 200, 255, 256, 257])
def test_tokens_that_are_still_as_they_came(length):
    """Keys wait for 128 and go all at once; values keep a sliding window of 128. Read in one pass or one by one."""
    run = run_of("kivi()", layers=1, max_position_embeddings=512)
    for prompt in {length, max(1, length - 3)}:
        keys, values = fill(run, text(length), prompt).slot_layers[0].stores
        assert keys.tails == length % 128 and keys.lengths == length
        assert values.tails == min(length, 128) and values.lengths == length


def decoding_errors(steps: str, before: int = 200, after: int = 200) -> list[float]:
    """Relative error of the keys held, against the same tokens' own, after one step and after many."""
    ids, shape = text(before + after), {"layers": 1, "max_position_embeddings": 512}
    plain = fill(run_of("kv_quant(key_bits=16,value_bits=16)", **shape), ids, before).slot_layers[0].stores[0].decode()
    errors = []
    for length in (before + 1, before + after):
        layer = fill(run_of(steps, **shape), ids[:length], before).slot_layers[0]
        valid, places = layer.valid(), layer.places().expand(1, layer.heads, -1)[0].long()
        held, own = layer.stores[0].decode(), plain.gather(1, places[..., None].expand(-1, -1, plain.shape[2]))
        units = torch.as_tensor(layer.stores[0].units).view(-1, 1) * layer.stores[0].unit
        mask = (torch.arange(places.shape[1]) < units).expand(places.shape)
        mask = mask if valid is None else mask & valid[0]
        errors.append(float((held - own)[mask].norm() / own[mask].norm()))
    return errors


@pytest.mark.parametrize(
    "steps",
    ["h2o(budget=128), kivi(group=8,residual=8)", "h2o(keep=1.0), kivi(group=8,residual=8)", "kivi(residual=32)"],
)
def test_encoded_tokens_are_never_encoded_again(steps):
    """The error of encoded keys is after 200 steps what it was after one."""
    first, last = decoding_errors(steps)
    assert first > 0 and abs(last - first) < 0.02 * first


def test_keys_that_come_while_decoding_are_rounded_like_those_of_the_prompt():
    ids, shape = text(256), {"layers": 1, "max_position_embeddings": 512}
    plain = fill(run_of("kivi(bits=16)", **shape), ids, 256).slot_layers[0].stores[0].decode()
    errors = []
    for prompt in (256, 1):
        held = fill(run_of("kivi(group=8,residual=16)", **shape), ids, prompt).slot_layers[0].stores[0].decode()
        errors.append(float((held - plain).norm() / plain.norm()))
    assert errors[1] > 0 and abs(errors[0] - errors[1]) < 0.1 * errors[0]


@pytest.mark.parametrize("bad", ["kivi(group=0)", "kivi(residual=16)", "kivi(residual=48)"])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(Exception, match=r"group must|residual must"):
        run_of(bad)


def test_the_fused_op_reads_a_cache_as_it_is_stored():
    """Attention over codes and tails equals attention over what they decode to; two parts make up the whole."""
    layer = fill(run_of("kivi(group=16,residual=32)", **GROUPED), text(75), 70).slot_layers[0]
    keys, values = layer.stores
    query = torch.randn(len(keys.tail), 2, 32, generator=torch.Generator().manual_seed(0))
    attend = functools.partial(ops.load("kv_attend"), key_bits=2, value_bits=2, unit=16, scaling=0.2)
    coded = tuple(part[:, :, 0] for part in values.codes)  # units of one token
    out, total = attend(query, *keys.codes, keys.tail, *coded, values.tail)
    scores = query @ keys.decode().mT * 0.2
    torch.testing.assert_close(out, scores.softmax(-1) @ values.decode(), atol=1e-5, rtol=0)
    torch.testing.assert_close(total, scores.logsumexp(-1), atol=1e-5, rtol=0)
    # Tokens 0 to 31, of both of which are codes, and all others.
    none = query.new_zeros(len(query), 0, 32)
    first = attend(query, *(part[:, :2] for part in keys.codes), none, *(part[:, :32] for part in coded), none)
    rest = attend(
        query, *(part[:, 2:] for part in keys.codes), keys.tail, *(part[:, 32:] for part in coded), values.tail
    )
    shares = torch.stack([first[1], rest[1]]).softmax(0)[..., None]
    torch.testing.assert_close(shares[0] * first[0] + shares[1] * rest[0], out, atol=1e-5, rtol=0)


def test_keys_by_channel_and_values_by_token_lose_least_of_what_attention_gives():
    """Of the four ways, where a few channels of keys are large in all tokens, and values have tokens of unlike size.

    The paper's codecs, each put to keys and to values; what is compared is the error of attention's output (table 2).
    """
    by_channel, by_token = KIVI(residual=32).codecs()
    for seed in range(5):
        random = torch.Generator().manual_seed(seed)
        query, keys, values = (torch.randn(4, n, 32, generator=random) for n in (16, 256, 256))
        keys[:, :, [3, 17]] += 20
        values *= torch.randn(4, 256, 1, generator=random).exp()

        def attend(keys: Tensor, values: Tensor, query: Tensor = query) -> Tensor:
            return (query @ keys.mT / 32**0.5).softmax(-1) @ values

        def hold(codec: Codec, x: Tensor) -> Tensor:
            return codec.decode(codec.encode(x.unflatten(1, (-1, codec.unit))), 32).flatten(1, 2)

        own, loss = attend(keys, values), {}
        for names in itertools.product(("channel", "token"), repeat=2):
            codecs = [{"channel": by_channel, "token": by_token}[name] for name in names]
            found = attend(*(hold(codec, x) for codec, x in zip(codecs, (keys, values), strict=True)))
            loss[names] = float((found - own).norm() / own.norm())
        assert min(loss, key=loss.__getitem__) == ("channel", "token"), loss
        assert loss["channel", "token"] < 0.5 * loss["token", "token"]  # keys are what it is about
