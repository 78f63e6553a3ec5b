"""Packed linears: what goes in comes out, what is stored is what is counted, what is declared can be rebuilt."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from effbench.formats import codebook, lattice
from effbench.formats.codebook import LutLinear, block_absmax
from effbench.formats.float8 import FP8Linear
from effbench.formats.integer import IntLinear
from effbench.formats.lattice import E8PLinear
from effbench.formats.packed import Packed
from effbench.formats.packing import pack, unpack, word_count
from effbench.kernels._common.dynamic_map import SIGNED
from effbench.kernels.e8p_linear.codebook import ONE_BIT, PATTERNS, decode
from effbench.methods.quant.nf4 import LEVELS as NF4
from effbench.nn.model.linear import dense_weight, kept, rebuilt, stored_bytes
from effbench.ops import backend_calls, reset_backend_calls

OUT, IN = 24, 96


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _int(bits: int, size: int | None, *, zeros: bool = False, order: bool = False, rows: int = OUT, keep: bool = False,
         bias: bool = False) -> IntLinear:  # fmt: skip
    on = _random()
    groups = -(-IN // (size or IN))
    codes = torch.randint(2**bits, (OUT, IN), generator=on)
    scale = torch.rand(rows, groups, generator=on) + 0.5
    zero = torch.randint(2**bits, (rows, groups), generator=on) if zeros else None
    g_idx = torch.randperm(IN, generator=on) % groups if order else None
    mask = None
    if keep:
        mask = torch.rand(OUT, IN, generator=on) < 0.5
        middle = torch.full((rows, groups), 2 ** (bits - 1)) if zero is None else zero
        codes = torch.where(mask, codes, middle.repeat_interleave(size or IN, 1)[:, :IN])
    offset = torch.randn(OUT, generator=on) if bias else None
    return IntLinear.of(codes, scale, zero, g_idx, bits=bits, group_size=size, bias=offset, keep=mask)


def _nf4(double_quant: bool, outliers: bool = False) -> LutLinear:
    on = _random()
    weight = torch.randn(OUT, IN, generator=on)
    absmax = block_absmax(weight, 64)
    codes = codebook.nearest(weight / codebook.spread(absmax, 64, (OUT, IN)), NF4)
    far = weight * (weight.abs() > 2.5) if outliers else None
    return LutLinear.of(codes, NF4, bits=4, block=64, absmax=absmax, double_quant=double_quant, outliers=far)


def _per_row(bits: int, outliers: bool = False) -> LutLinear:
    on = _random()
    codes = torch.randint(2**bits, (OUT, IN), generator=on)
    far = torch.randn(OUT, IN, generator=on) * (torch.rand(OUT, IN, generator=on) < 0.01)
    lut = torch.randn(OUT, 2**bits, generator=on)
    return LutLinear.of(codes, lut, bits=bits, outliers=far if outliers else None, bias=torch.ones(OUT))


def _e8p(bits: int) -> E8PLinear:
    on = _random()
    weight = torch.randn(OUT, IN, generator=on)
    signs_in, signs_out = (1 - 2 * torch.randint(2, (n,), generator=on) for n in (IN, OUT))
    rotated = lattice.rotate(weight, signs_in, signs_out)
    scale = rotated.square().mean().sqrt()
    codes, residual = lattice.encode((rotated / scale).view(OUT, -1, 8), bits)
    return E8PLinear.of(codes, scale, signs_in, signs_out, residual)


def _fp8(per_row: bool, activations: str = "none") -> FP8Linear:
    weight = torch.randn(OUT, IN, generator=_random())
    return FP8Linear.from_weight(weight, per_row=per_row, activations=activations, bias=torch.ones(OUT))


MAKERS: dict[str, Callable[[], Packed]] = {
    **{f"int{bits}": lambda bits=bits: _int(bits, 32) for bits in (2, 3, 4, 8)},
    **{f"int{bits}-zeros": lambda bits=bits: _int(bits, 32, zeros=True, bias=True) for bits in (2, 3, 4, 8)},
    "int4-order": lambda: _int(4, 32, zeros=True, order=True),
    "int3-row-masked": lambda: _int(3, None, keep=True),
    "int4-masked": lambda: _int(4, 16, zeros=True, keep=True),
    **{f"int{bits}-short": lambda bits=bits: _int(bits, 40, zeros=True) for bits in (3, 4)},  # 40, 40 and 16
    "int4-short-order": lambda: _int(4, 64, zeros=True, order=True),
    "int2-short-masked": lambda: _int(2, 64, keep=True),
    "int8-tensor": lambda: _int(8, None, zeros=True, rows=1),
    "nf4": lambda: _nf4(False),
    "nf4-double": lambda: _nf4(True),
    "nf4-outliers": lambda: _nf4(True, outliers=True),
    "rows3": lambda: _per_row(3),
    "rows4-outliers": lambda: _per_row(4, outliers=True),
    "e8p2": lambda: _e8p(2),
    "e8p3": lambda: _e8p(3),
    "e8p4": lambda: _e8p(4),
    "fp8-rows": lambda: _fp8(True),
    "fp8-tensor": lambda: _fp8(False),
    "fp8-token": lambda: _fp8(True, "token"),
}
all_formats = pytest.mark.parametrize("name", MAKERS)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 100), st.integers(0, 3), st.integers(0, 2**32))
def test_packing_round_trip(bits: int, n: int, rows: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, 2, n), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, 2, word_count(n, bits))
    assert torch.equal(unpack(words, bits, n).long(), codes)


def test_packing_layout() -> None:
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x321]
    # Code 10 of 3 bits has two bits in the first word and one in the second; 32 codes fill three words.
    assert pack(torch.tensor([0] * 10 + [7]), 3).tolist() == [-(2**30), 1]
    assert pack(torch.full((32,), 7), 3).tolist() == [-1, -1, -1]


@all_formats
def test_forward_multiplies_by_the_dense_weight(name: str) -> None:
    module = MAKERS[name]()
    bias = torch.zeros(OUT) if module.bias is None else module.bias.detach()
    reset_backend_calls()
    columns = (module(torch.eye(IN)) - bias).T
    assert all(set(backends) == {"reference"} for backends in backend_calls().values()) and backend_calls()
    torch.testing.assert_close(columns, dense_weight(module), atol=2e-6, rtol=1e-6)
    assert dense_weight(module).dtype == torch.float32
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)):
        x = torch.randn(2, 3, IN).to(dtype)
        y = module(x)
        assert y.dtype == dtype
        expected = x.float() @ dense_weight(module).T + bias
        if name == "fp8-token":
            tolerance = 2**-4  # half a step of E4M3
        assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()


@all_formats
def test_gradient_of_the_input(name: str) -> None:
    module = MAKERS[name]()
    x = torch.randn(5, IN, requires_grad=True)
    grad = torch.randn(5, OUT)
    module(x).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ dense_weight(module), atol=1e-4, rtol=1e-5)


@all_formats
def test_saved_and_rebuilt_from_its_declaration(name: str, tmp_path: Path) -> None:
    module = MAKERS[name]()
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    config = module.config()
    assert all(value is None or type(value) in (int, bool, str) for value in config.values())
    empty = type(module)(**config)
    empty.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    assert empty.config() == config
    assert torch.equal(dense_weight(empty), dense_weight(module))
    x = torch.randn(2, IN)
    assert torch.equal(empty(x), module(x))


@all_formats
def test_counted_bytes_are_the_stored_bytes(name: str) -> None:
    module = MAKERS[name]()
    counted = stored_bytes(module, torch.float32)
    stored = sum(tensor.nbytes for tensor in module.state_dict().values())
    assert counted.weights + counted.metadata == stored
    assert counted.metadata > 0
    assert module.metadata <= {name for cls in type(module).__mro__ for name in getattr(cls, "__annotations__", ())}


@pytest.mark.parametrize(
    ("name", "bits"),
    {"int2": 2, "int3-zeros": 3, "nf4": 4, "rows3": 3, "e8p2": 2, "e8p3": 3, "e8p4": 4, "fp8-rows": 8}.items(),
)
def test_codes_take_the_bits_they_claim(name: str, bits: int) -> None:
    module = MAKERS[name]()
    bias = 0 if module.bias is None else 4 * OUT
    assert stored_bytes(module, torch.float32).weights - bias == OUT * IN * bits // 8


@all_formats
def test_rebuilding_what_it_holds_changes_nothing(name: str) -> None:
    module = MAKERS[name]()
    again = rebuilt(module, dense_weight(module))
    assert type(again) is type(module) and isinstance(again, Packed)
    assert again.config() == module.config()
    if name == "e8p4":  # two stages, each greedy: the first may find a nearer point than the pair had
        assert (dense_weight(again) - dense_weight(module)).square().mean() < 0.01
    else:
        torch.testing.assert_close(dense_weight(again), dense_weight(module), atol=1e-5, rtol=1e-3)
    if module.bias is not None:
        assert again.bias is not None and torch.equal(again.bias, module.bias)


@all_formats
def test_rebuilding_rounds_to_the_nearest(name: str) -> None:
    module = MAKERS[name]()
    weight = dense_weight(module)
    moved = weight + 1e-3 * weight.abs().mean() * torch.randn(OUT, IN, generator=_random())
    again = dense_weight(rebuilt(module, moved))
    zeros = kept(module)
    change = (again - moved) if zeros is None else (again - moved)[zeros]
    assert change.square().mean() < (0.01 if name == "e8p4" else 1.1e-3 * weight.square().mean())


@all_formats
def test_casting_a_model_leaves_the_codes_alone(name: str) -> None:
    module = MAKERS[name]()
    weight = dense_weight(module)
    dtypes = {key: tensor.dtype for key, tensor in module.named_buffers()}
    module.to(torch.bfloat16).half()
    assert {key: tensor.dtype for key, tensor in module.named_buffers()} == dtypes
    assert torch.equal(dense_weight(module), weight)
    assert module.bias is None or module.bias.dtype == torch.float16
    assert all(tensor.is_meta for tensor in module.to("meta").buffers())


@pytest.mark.parametrize("name", ["int3-row-masked", "int4-masked"])
def test_pruned_weights_stay_zero(name: str) -> None:
    module = MAKERS[name]()
    keep = kept(module)
    assert keep is not None and keep.shape == (OUT, IN)
    assert (dense_weight(module)[~keep] == 0).all()
    again = rebuilt(module, torch.randn(OUT, IN))
    assert torch.equal(kept(again), keep)  # type: ignore[arg-type]
    assert (dense_weight(again)[~keep] == 0).all()
    assert stored_bytes(module, torch.float32).metadata >= OUT * IN // 8


def test_integers_by_hand() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    scale = torch.tensor([[1.0, 2.0], [0.5, 0.25]])
    zero = torch.tensor([[0, 1], [3, 2]])
    grouped = IntLinear.of(codes, scale, zero, bits=2, group_size=2)
    assert dense_weight(grouped).tolist() == [[0, 1, 2, 4], [0, -0.5, -0.25, -0.5]]
    shuffled = IntLinear.of(codes, scale, zero, torch.tensor([1, 0, 1, 0]), bits=2, group_size=2)
    assert dense_weight(shuffled).tolist() == [[-2, 1, 2, 3], [0.25, -0.5, -0.25, -1.5]]
    assert dense_weight(IntLinear.of(codes, scale[:, :1], bits=2)).tolist() == [[-2, -1, 0, 1], [0.5, 0, -0.5, -1]]
    short = IntLinear.of(codes, scale, zero, bits=2, group_size=3)
    assert dense_weight(short).tolist() == [[0, 1, 2, 4], [0, -0.5, -1, -0.5]]
    whole = IntLinear.of(codes, torch.tensor([[2.0]]), torch.tensor([[1]]), bits=2)
    assert dense_weight(whole).tolist() == [[-2, 0, 2, 4], [4, 2, 0, -2]]
    assert whole.config()["per_tensor"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntLinear(8, 8, bits=5), "bits=5"),
        (lambda: IntLinear(10, 8, bits=4, group_size=0), "group_size=0"),
        (lambda: IntLinear(10, 8, bits=4, group_size=4, per_tensor=True), "no groups"),
        (lambda: IntLinear.of(torch.tensor([[3, 1, 2]]), torch.ones(1, 3), bits=2, group_size=2), "scale is"),
        (lambda: IntLinear.of(torch.tensor([[4]]), torch.ones(1, 1), bits=2), "codes do not fit"),
        (lambda: IntLinear.of(torch.tensor([[3]]), torch.full((1, 1), 1e6), bits=2), "not finite"),
        (lambda: LutLinear(8, 8, bits=8), "bits=8"),
        (lambda: LutLinear.of(torch.zeros(1, 8).int(), NF4, bits=4, block=4), "come together"),
        (lambda: LutLinear.of(torch.zeros(1, 8).int(), NF4[:8], bits=4), "lut is"),
        (lambda: E8PLinear(12, 8), "multiple of 8"),
        (lambda: E8PLinear(8, 92), "order 92"),
        (lambda: FP8Linear(8, 8, activations="row"), "activations="),
    ],
)
def test_what_cannot_be_held_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_nf4_levels() -> None:
    # The levels printed in the appendix of the QLoRA paper, to the digits that matter in float32.
    printed = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
               0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]  # fmt: skip
    torch.testing.assert_close(NF4, torch.tensor(printed), atol=2e-7, rtol=0)


def test_dynamic_map() -> None:
    assert len(SIGNED.unique()) == 256
    assert SIGNED[-1] == 1 and SIGNED.abs().min() == 0
    assert SIGNED[-2] == pytest.approx(1 - 0.9 / 128) and -SIGNED[0] == SIGNED[-2]
    assert SIGNED[SIGNED > 0].min() == pytest.approx(0.55e-6)


@pytest.mark.parametrize(("double_quant", "error"), [(False, 0.008451), (True, 0.008457)])
def test_nf4_error_and_bytes(double_quant: bool, error: float) -> None:
    weight = torch.randn(1024, 512, generator=_random())
    absmax = block_absmax(weight, 64)
    codes = codebook.nearest(weight / codebook.spread(absmax, 64, (1024, 512)), NF4)
    module = LutLinear.of(codes, NF4, bits=4, block=64, absmax=absmax, double_quant=double_quant)
    assert float((dense_weight(module) - weight).square().mean()) == pytest.approx(error, rel=0.01)
    tables = 16 * 4 + double_quant * (256 * 4 + 4)
    metadata = stored_bytes(module, torch.float32).metadata - tables
    assert metadata * 8 / weight.numel() == (8 / 64 + 32 / (64 * 256) if double_quant else 0.5)


def test_nearest_level_of_unsorted_tables() -> None:
    levels = torch.tensor([[3.0, -1.0, 0.5, 0.0], [1.0, 2.0, 4.0, 3.0]])
    values = torch.tensor([[2.9, -7.0, 0.2, 9.0], [1.6, 3.4, 0.0, 3.6]])
    assert codebook.nearest(values, levels).tolist() == [[0, 1, 3, 0], [1, 3, 0, 2]]
    assert codebook.nearest(values[0], levels[0]).tolist() == [0, 1, 3, 0]


def _points() -> Tensor:
    return decode(torch.arange(2**16))


def test_e8p_points() -> None:
    points = _points()
    assert len(points.unique(dim=0)) == 2**16
    shifted = points - torch.where((points - 0.25) % 1 == 0.5, 0.25, -0.25)
    assert (shifted % 1 == 0.5).all() and (shifted.sum(1) % 2 == 0).all()
    norms, counts = shifted.abs().unique(dim=0).square().sum(1).unique(return_counts=True)
    assert dict(zip(norms.tolist(), counts.tolist(), strict=True)) == {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}
    assert torch.equal(points[0], PATTERNS[0] + 0.25)
    assert torch.equal(decode(torch.tensor([-1], dtype=torch.int16)), points[-1:])
    # Bit 1 negates coordinate 2 and makes the parity odd: shifted down, and bit 0 is read inverted.
    assert points[2].tolist() == [-0.75, 0.25, -0.75, 0.25, 0.25, 0.25, 0.25, 0.25]
    assert len(ONE_BIT.unique(dim=0)) == 256


def test_e8p_encoder_is_exact() -> None:
    points = _points()
    assert torch.equal(lattice.nearest(points).int() & 0xFFFF, torch.arange(2**16, dtype=torch.int32))
    vectors = torch.cat([scale * torch.randn(30, 8, generator=_random()) for scale in (0.3, 1, 2)])
    best = torch.cdist(vectors.double(), points.double()).min(1).values
    found = (vectors.double() - decode(lattice.nearest(vectors)).double()).norm(dim=1)
    torch.testing.assert_close(found, best, atol=1e-6, rtol=0)
    assert lattice.nearest(torch.zeros(3, 0, 8)).shape == (3, 0)
    found_one = ONE_BIT[lattice.nearest_one_bit(vectors).long()]
    best_one = torch.cdist(vectors, ONE_BIT).min(1).values
    torch.testing.assert_close((vectors - found_one).norm(dim=1), best_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scale", "error"), [(1.03, 0.0913), (1.0, 0.0918), (0.9, 0.0989)])
def test_e8p_error_on_normal_numbers(scale: float, error: float) -> None:
    x = torch.randn(50_000, 8, generator=_random())
    found = decode(lattice.nearest(scale * x)) / scale
    assert float((found - x).square().mean()) == pytest.approx(error, abs=5e-4)


def test_more_bits_come_nearer() -> None:
    weight = torch.randn(OUT, IN, generator=_random())
    errors = [float((dense_weight(_e8p(bits)) - weight).square().mean()) for bits in (2, 3, 4)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_rotation_is_undone_and_spreads_outliers() -> None:
    weight = torch.zeros(OUT, IN)
    weight[3, 5] = 1
    signs_in, signs_out = (1 - 2 * torch.randint(2, (n,), generator=_random()) for n in (IN, OUT))
    rotated = lattice.rotate(weight, signs_in, signs_out)
    torch.testing.assert_close(rotated.abs(), torch.full((OUT, IN), 1 / math.sqrt(OUT * IN)))
    torch.testing.assert_close(lattice.rotate_back(rotated, signs_in, signs_out), weight, atol=1e-6, rtol=0)


def test_fp8_uses_the_whole_range() -> None:
    module = _fp8(True)
    assert (module.weight.float().abs().amax(1) == 448).all()
    weight = torch.randn(OUT, IN, generator=_random())
    assert ((dense_weight(module) - weight).abs() <= weight.abs() / 16 + 1e-3 * weight.abs().max()).all()


def test_outliers_are_exact_after_rebuilding() -> None:
    module = MAKERS["nf4-outliers"]()
    weight = torch.randn(OUT, IN, generator=_random())
    again = rebuilt(module, weight)
    assert isinstance(again, LutLinear) and again.crow is not None and again.col is not None
    row = torch.arange(OUT).repeat_interleave(again.crow.diff())
    at = (row, again.col.long())
    torch.testing.assert_close(dense_weight(again)[at], weight[at], atol=2e-3, rtol=1e-3)
