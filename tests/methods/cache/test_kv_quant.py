"""Key-value quantization: against dequantisation in float64, and bytes against arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from toys_cache import GROUPED, Rule, compare, fill, round_range, run_of, text

from effbench.core.errors import Unsupported
from effbench.methods.cache.kv_quant import KVQuant

PER = ("token", "group", "channel", "head")


class Rounded(Rule):
    """Tokens older than the residual, those of whole groups, in few bits."""

    def __init__(self, key_bits: int | str, value_bits: int | str, per: str, group: int, residual: int) -> None:
        super().__init__()
        self.bits, self.per, self.group, self.residual, self.settled = (key_bits, value_bits), per, group, residual, 0

    def round(self, x: Tensor, bits: int | str) -> Tensor:
        count = max(0, self.settled - self.residual)
        if self.per in ("channel", "head"):
            count -= count % self.group
            grouped = x[:, :count].unflatten(1, (-1, self.group)) if count else x[:, :0, None]
            old = round_range(grouped, (2, 3) if self.per == "head" else (2,), bits) if count else grouped
            return torch.cat([old.flatten(1, 2), x[:, count:]], 1)
        grouped = x[:, :count].unflatten(2, (-1, self.group if self.per == "group" else x.shape[2]))
        return torch.cat([round_range(grouped, (3,), bits).flatten(2), x[:, count:]], 1)

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.round(keys, self.bits[0]), self.round(values, self.bits[1])

    def settle(self, first: bool) -> None:
        self.settled = self.alive.shape[1]


def step_of(key_bits: int | str, value_bits: int | str, per: str, group: int, residual: int) -> str:
    settings = f"key_bits={key_bits!r},value_bits={value_bits!r},per={per!r},group={group},residual={residual}"
    return f"kv_quant({settings})"


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(("key_bits", "value_bits", "residual"), [(8, 4, 0), (2, 16, 5), (4, 2, 16), ("fp8", "fp8", 3)])
def test_logits_equal_dequantisation_in_float64(per, key_bits, value_bits, residual):
    settings = (key_bits, value_bits, per, 8, residual)
    compare(run_of(step_of(*settings), **GROUPED), 21, 40, [Rounded(*settings) for _ in range(2)], exact=1e-4)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("bits", [2, 4, 8, "fp8"])
def test_constant_and_zero_groups_come_back_exactly(per, bits):
    codec = KVQuant(bits, bits, per, group=8).codecs()[0]
    for value in (0.0, 3.5, -1e-3):
        units = torch.full((2, 3, codec.unit, 16), value)
        back = codec.decode(codec.encode(units), 16)
        torch.testing.assert_close(back, units, atol=0, rtol=2**-22 if bits == "fp8" else 0)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_fp8_are_the_largest_number_over_448_and_count(per, dtype):
    """One for each unit, in the type of the keys; the largest number is kept."""
    codec = KVQuant("fp8", "fp8", per, group=8).codecs()[0]
    units = torch.randn(2, 3, codec.unit, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scales = codec.encode(units)
    together = {"token": (-1,), "group": (-1,), "channel": (-2,), "head": (-1, -2)}[per]
    grouped = units.unflatten(-1, (-1, 8)) if per == "group" else units
    largest = grouped.abs().amax(together)
    assert scales.dtype == dtype and torch.equal(scales.flatten(), (largest / 448).flatten())
    assert codes.dtype == torch.float8_e4m3fn and codes.numel() == units.numel()
    assert codes.nbytes + scales.nbytes == units.numel() + largest.numel() * dtype.itemsize
    back = codec.decode((codes, scales), 16)
    held = (back.unflatten(-1, (-1, 8)) if per == "group" else back).abs().amax(together)
    torch.testing.assert_close(held, largest, atol=0, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("bits", [2, 4, 8, "fp8"])
def test_the_error_is_relative(per, bits, dtype):
    """Keys of 0.01 and of 10,000 lose what keys of 1 lose."""
    codec = KVQuant(bits, bits, per, group=8).codecs()[0]
    keys = torch.randn(2, 16, codec.unit, 16, generator=torch.Generator().manual_seed(0))

    def error(size: float) -> float:
        units = (keys * size).to(dtype)
        back = codec.decode(codec.encode(units), 16)
        assert back.dtype == dtype
        return float((back - units).float().norm() / units.float().norm())

    assert all(abs(error(size) - error(1.0)) < 0.1 * error(1.0) for size in (1e-2, 1e4))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("residual", [0, 5])
def test_bytes_held_are_arithmetic(per, residual):
    """Codes are packed words, and scales and least numbers count; fp8 has scales alone."""
    length, heads, width, group, numbers = 39, 4, 32, 8, 4
    for key_bits, value_bits in itertools.product((16, 8, 4, 2, "fp8"), (16, 2)):
        run = run_of(step_of(key_bits, value_bits, per, group, residual), layers=1)
        cache = fill(run, text(length), 30)
        layer, expected = cache.slot_layers[0], 0
        for bits, store in zip((key_bits, value_bits), layer.stores, strict=True):
            old = 0 if bits == 16 else length - residual
            if per in ("channel", "head"):
                old -= old % group
            together = {"token": width, "group": group, "channel": group, "head": group * width}[per]
            groups = old * width // together
            payload = groups * -(-together * (8 if bits == "fp8" else int(bits)) // 32) * 4
            overhead = groups * numbers * (1 if bits == "fp8" else 2)
            expected += heads * ((length - old) * width * numbers + (payload + overhead if old else 0))
            if store.codes:
                assert store.codes[0].dtype == (torch.float8_e4m3fn if bits == "fp8" else torch.int32)
                assert store.codes[0].nbytes == heads * payload
                assert store.tail.untyped_storage().nbytes() == heads * (length - old) * width * numbers
        assert cache.nbytes().tolist() == [expected]


def test_an_eviction_lets_go_of_codes():
    """Bytes are those of what is left: per token at once, per channel by whole groups; fp8 may be evicted as well."""
    length, budget = 60, 8
    for bits, each in ((8, 32 + 8), ("fp8", 32 + 4)):
        cache = fill(run_of(f"h2o(budget={budget}), {step_of(bits, bits, 'token', 8, 0)}", layers=1), text(length), 40)
        assert cache.nbytes().tolist() == [4 * budget * (2 * each + 4 + 4)]  # codes and scales, place and mass


def test_heads_that_cannot_be_divided_are_unsupported():
    run = run_of("kv_quant(per='group',group=24)")
    with pytest.raises(Unsupported, match="32 channels cannot be rounded in groups of 24"):
        fill(run, text(9), 8)


@pytest.mark.parametrize("bad", ["kv_quant(group=0)", "kv_quant(residual=-1)", "kv_quant(key_bits=3)"])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(Exception, match=r"group must|residual must|key_bits"):
        run_of(bad)
