"""Compressed rows of weights and of blocks: exactly the kept positions are stored, counted and multiplied by."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from effbench.formats.bcsr import BCSRLinear, split_blocks
from effbench.formats.csr import BitmaskLinear, Compressed, CSRLinear, Unstructured, pack_unstructured
from effbench.formats.packing import unpack
from effbench.kernels._common.compiled import compile_launch
from effbench.kernels._common.launch import record_launches
from effbench.nn.model.linear import dense_weight, kept, rebuilt, stored_as, stored_bytes
from effbench.ops import Declined, load

OUT, IN = 24, 96
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Form = type[Unstructured] | tuple[int, int]  # a class, or the block of a BCSRLinear
FORMS: list[Form] = [CSRLinear, BitmaskLinear, (4, 8), (8, 1), (3, 32), (OUT, IN)]
every_form = pytest.mark.parametrize("form", FORMS, ids=str)


def _random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _block(form: Form) -> tuple[int, int]:
    return form if isinstance(form, tuple) else (1, 1)


def _mask(out: int, width: int, form: Form, share: float = 0.3, seed: int = 0) -> Tensor:
    """Random whole blocks, the first row of them empty where there are several."""
    rows, columns = _block(form)
    keep = torch.rand(out // rows, width // columns, generator=_random(seed)) < share
    keep[0] = len(keep) == 1
    return keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _weight(dtype: torch.dtype = torch.float32, out: int = OUT, width: int = IN) -> Tensor:
    """Normal weights some of which are exactly zero."""
    weight = torch.randn(out, width, generator=_random(1))
    return (weight * (torch.rand(out, width, generator=_random(2)) < 0.8)).to(dtype)


def _hold(weight: Tensor, keep: Tensor, form: Form, bias: Tensor | None = None) -> Compressed:
    if isinstance(form, tuple):
        return BCSRLinear.of(weight, keep, block=form, bias=bias)
    return form.of(weight, keep, bias=bias)


def _places(module: Compressed) -> Tensor:
    return module.get_buffer(module.places)


def _check_indices(module: Compressed) -> None:
    assert module.crow.dtype == torch.int32
    assert _places(module).dtype == (torch.int32 if isinstance(module, BitmaskLinear) else torch.int16)


def test_by_hand() -> None:
    weight = torch.tensor([[0, 1, 2, 0], [3, 0, 0, 4], [0, 0, 0, 0], [5, 6, 0, 7.0]])
    keep = weight != 0
    keep[1, 1] = True
    csr = CSRLinear.of(weight, keep)
    assert csr.crow.tolist() == [0, 2, 5, 5, 8]
    assert csr.col.tolist() == [1, 2, 0, 1, 3, 0, 1, 3]
    assert csr.values.tolist() == [1, 2, 3, 0, 4, 5, 6, 7]
    blocks = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    bcsr = BCSRLinear.of(weight, blocks, block=(2, 2))
    assert bcsr.crow.tolist() == [0, 1, 3] and bcsr.col.tolist() == [0, 0, 1]
    assert bcsr.values.tolist() == [[[0, 1], [3, 0]], [[0, 0], [5, 6]], [[0, 0], [0, 7]]]
    bitmask = BitmaskLinear.of(weight, keep)
    assert bitmask.crow.tolist() == csr.crow.tolist() and bitmask.values.tolist() == csr.values.tolist()
    assert bitmask.bits.tolist() == [[0b0110], [0b1011], [0], [0b1011]]
    x = torch.tensor([1.0, 10, 100, 1000])
    assert bitmask(x).tolist() == csr(x).tolist()
    assert csr(x).tolist() == [210, 4003, 0, 7065]
    assert bcsr(x).tolist() == [10, 3, 0, 7065]


@every_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_comes_back_exactly(form: Form, dtype: torch.dtype) -> None:
    weight, keep = _weight(dtype), _mask(OUT, IN, form)
    module = _hold(weight, keep, form)
    assert (weight[keep] == 0).any()  # zeros that are kept are stored
    assert module.values.dtype == dtype and module.values.numel() == keep.sum()
    assert not module.values.requires_grad and module.values.is_contiguous()
    _check_indices(module)
    assert dense_weight(module).dtype == torch.float32
    assert torch.equal(dense_weight(module), weight.float() * keep)
    assert torch.equal(kept(module), keep)  # type: ignore[arg-type]


@every_form
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_forward_is_the_dense_product(form: Form, dtype: torch.dtype) -> None:
    weight, keep, bias = _weight(), _mask(OUT, IN, form), torch.randn(OUT, generator=_random())
    module = _hold(weight, keep, form, bias)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for lead in ((), (1,), (17,), (2, 3), (0,)):
        x = torch.randn(*lead, IN, generator=_random(3)).to(dtype)
        y = module(x)
        assert y.dtype == dtype and y.shape == (*lead, OUT)
        exact = x.double() @ (weight * keep).double().T + bias.double()
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance * 100**0.5)


@every_form
def test_gradient_of_the_input(form: Form) -> None:
    module = _hold(_weight(), _mask(OUT, IN, form), form)
    x = torch.randn(5, IN, generator=_random(), requires_grad=True)
    grad = torch.randn(5, OUT, generator=_random(1))
    module(x).backward(grad)
    assert x.grad is not None and module.values.grad is None
    torch.testing.assert_close(x.grad, grad @ dense_weight(module), atol=1e-5, rtol=1e-5)


@every_form
@pytest.mark.parametrize("biased", [False, True])
def test_saved_and_rebuilt_from_its_declaration(form: Form, biased: bool, tmp_path: Path) -> None:
    module = _hold(_weight(), _mask(OUT, IN, form), form, torch.ones(OUT) if biased else None)
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    config = json.loads(json.dumps(module.config()))
    assert all(type(value) in (int, bool) for value in config.values())
    empty = type(module)(**config)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
    empty.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    assert empty.config() == config
    x = torch.randn(2, IN, generator=_random())
    assert torch.equal(empty(x), module(x))


@every_form
def test_rebuilding_keeps_the_positions(form: Form) -> None:
    keep, bias = _mask(OUT, IN, form), torch.ones(OUT)
    module = _hold(_weight(torch.bfloat16), keep, form, bias)
    other = torch.randn(OUT, IN, generator=_random(5))
    again = rebuilt(module, other)
    assert type(again) is type(module) and again.config() == module.config()  # type: ignore[attr-defined]
    assert torch.equal(again.crow, module.crow) and torch.equal(_places(again), _places(module))  # type: ignore
    assert torch.equal(dense_weight(again), other.bfloat16().float() * keep)
    assert torch.equal(again.bias, bias)  # type: ignore[arg-type]


@every_form
def test_casting_changes_values_and_leaves_indices_alone(form: Form) -> None:
    weight, keep = _weight(), _mask(OUT, IN, form)
    module = _hold(weight, keep, form)
    module.to(torch.bfloat16)
    assert module.values.dtype == torch.bfloat16 and not module.values.requires_grad
    assert torch.equal(dense_weight(module), weight.bfloat16().float() * keep)
    _check_indices(module)
    assert torch.equal(module.double().kept(), keep)
    assert all(tensor.is_meta for tensor in module.to("meta").state_dict().values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_bytes(dtype: torch.dtype) -> None:
    keep = _mask(OUT, IN, CSRLinear)
    csr = CSRLinear.of(_weight(dtype), keep)
    number = int(keep.sum())
    assert stored_bytes(csr, torch.bfloat16) == (number * 2, number * 2 + 4 * (OUT + 1))
    bitmask = BitmaskLinear.of(_weight(dtype), keep)
    assert stored_bytes(bitmask, torch.bfloat16) == (number * 2, OUT * IN // 8 + 4 * (OUT + 1))
    assert stored_as("values", csr.values, torch.bfloat16) == (torch.bfloat16 if dtype == torch.float32 else dtype)
    bcsr = BCSRLinear.of(_weight(dtype), _mask(OUT, IN, (4, 8)), (4, 8), bias=torch.ones(OUT))
    number = len(bcsr.values)
    assert stored_bytes(bcsr, torch.bfloat16) == (number * 4 * 8 * 2 + 2 * OUT, number * 2 + 4 * (OUT // 4 + 1))


@pytest.mark.parametrize(("width", "dtype"), [(2**15, torch.int16), (2**15 + 16, torch.int32)])
def test_columns_are_as_narrow_as_they_can_be(width: int, dtype: torch.dtype) -> None:
    keep = torch.zeros(2, width, dtype=torch.bool)
    keep[1, [0, width - 1]] = True
    module = CSRLinear.of(torch.ones(2, width), keep)
    assert module.col.dtype == dtype
    assert module.col.tolist() == [0, width - 1]
    assert torch.equal(module.kept(), keep)
    assert CSRLinear(**module.config()).col.dtype == dtype
    assert BCSRLinear.of(torch.ones(2, width), torch.ones(2, width) > 0, block=(2, 16)).col.dtype == torch.int16


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 7),
    form=st.one_of(st.sampled_from(FORMS[:2]), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_any_mask(rows: int, columns: int, form: Form, share: float, dtype: torch.dtype, seed: int) -> None:
    height, width = _block(form)
    out, inputs = rows * height, columns * width
    on = _random(seed)
    entries = torch.rand(rows, columns, generator=on) < share
    keep = entries.repeat_interleave(height, 0).repeat_interleave(width, 1)
    weight = torch.randn(out, inputs, generator=on).to(dtype)
    module = _hold(weight, keep, form)
    assert module.crow.diff().tolist() == entries.sum(1).tolist()
    if isinstance(module, BitmaskLinear):
        assert torch.equal(unpack(module.bits, 1, columns).bool(), entries)
    else:
        assert _places(module).tolist() == entries.nonzero()[:, 1].tolist()
    assert torch.equal(kept(module), keep)  # type: ignore[arg-type]
    assert torch.equal(dense_weight(module), weight.float() * keep)
    assert torch.equal(dense_weight(rebuilt(module, weight)), dense_weight(module))
    x = torch.randn(3, inputs, generator=on)
    torch.testing.assert_close(module(x), x @ dense_weight(module).T, atol=1e-5, rtol=1e-5)
    empty = type(module)(**module.config())
    assert [tensor.shape for tensor in empty.state_dict().values()] == [
        tensor.shape for tensor in module.state_dict().values()
    ]


@pytest.mark.parametrize(
    ("sparsity", "form", "bits"),
    [  # per place, with the starts of the rows; a column of 16 bits costs more than a bit per place up to 15/16 zeros
        (0.0, BitmaskLinear, 17.0),
        (0.3, BitmaskLinear, 12.2),
        (0.5, BitmaskLinear, 9.0),
        (0.7, BitmaskLinear, 5.8),
        (0.93, BitmaskLinear, 2.12),
        (0.9375, CSRLinear, 2.0),  # as many
        (0.95, CSRLinear, 1.6),
    ],
)
@pytest.mark.parametrize("width", [576, 4096])
def test_zeros_anywhere_take_the_smaller_form(
    sparsity: float, form: type[Unstructured], bits: float, width: int
) -> None:
    keep = torch.zeros(64, width, dtype=torch.bool)
    keep.view(-1)[torch.randperm(keep.numel(), generator=_random())[: round(keep.numel() * (1 - sparsity))]] = True
    weight, bias = torch.randn(64, width, generator=_random(1)), torch.ones(64)
    module = pack_unstructured(weight, keep, bias)
    assert (
        type(module) is form and torch.equal(dense_weight(module), weight * keep) and torch.equal(module.kept(), keep)
    )
    found = 8 * sum(stored_bytes(module, torch.bfloat16)) - 16 * 64 - 32 * 65  # without the bias
    assert found / keep.numel() == pytest.approx(bits, abs=1e-3)
    other = CSRLinear if form is BitmaskLinear else BitmaskLinear
    assert sum(stored_bytes(other.of(weight, keep, bias), torch.bfloat16)) >= sum(stored_bytes(module, torch.bfloat16))


@pytest.mark.parametrize(
    ("block", "message"), [((5, 8), "do not tile"), ((4, 7), "do not tile"), ((4, 8), "only in part")]
)
def test_masks_that_are_not_of_blocks_are_refused(block: tuple[int, int], message: str) -> None:
    keep = torch.ones(OUT, IN, dtype=torch.bool)
    keep[3, 5] = False
    with pytest.raises(ValueError, match=message):
        BCSRLinear.of(_weight(), keep, block=block)


def test_blocks_of_a_transposed_matrix() -> None:
    matrix = torch.arange(24.0).view(4, 6).T
    assert torch.equal(split_blocks(matrix, 2, 2)[1, 0], matrix[2:4, :2])
    module = BCSRLinear.of(matrix, torch.ones(6, 4, dtype=torch.bool), block=(2, 2))
    assert module.values.is_contiguous() and torch.equal(dense_weight(module), matrix)


NOTHING_KEPT = """
import torch
from effbench.ops import load, poison_memory
col, bits = torch.zeros(0, dtype=torch.int16), torch.zeros(3, 1, dtype=torch.int32)
for name, shape, places in (
    ("csr_linear", (0,), {"col": col}),
    ("bitmask_linear", (0,), {"bits": bits}),
    ("bcsr_linear", (0, 4, 8), {"col": col}),
    ("bcsr_linear", (0, 16, 16), {"col": col}),
):
    for batch in (0, 1, 3, 17):
        crow, values = torch.zeros(4, dtype=torch.int32), torch.zeros(shape)
        with poison_memory():
            y = load(name).run("triton", x=torch.ones(batch, 32), crow=crow, values=values, **places)
        assert y.shape == (batch, 3 * (shape[1] if shape[1:] else 1)) and (y == 0).all(), (name, y)
"""


def test_kernels_of_nothing_at_all() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", NOTHING_KEPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_leave_to_the_reference_what_they_cannot_do() -> None:
    crow, col = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int16)
    for name, x, values, places in (
        ("csr_linear", torch.ones(2, 8).double(), torch.ones(1), {"col": col}),
        ("bitmask_linear", torch.ones(2, 8).double(), torch.ones(1), {"bits": crow[1:, None]}),
        ("bcsr_linear", torch.ones(2, 8).double(), torch.ones(1, 4, 8), {"col": col}),
        ("bcsr_linear", torch.ones(2, 8), torch.ones(1, 1025, 8), {"col": col}),
    ):
        with pytest.raises(Declined):
            load(name).run("triton", x=x, crow=crow, values=values, **places)


# Batches without tensor cores; the ceilings in test_kernels.py expect them.
@pytest.mark.parametrize(
    ("name", "fields", "ceiling"),
    [("csr_linear", {"number": 2**18}, 81), ("bcsr_linear", {"block": (1, 8), "number": 2**16}, 88)],
)
def test_compiled_for_hopper(name: str, fields: dict[str, object], ceiling: float) -> None:
    op = load(name)
    with record_launches() as launches:
        op.run(
            "triton",
            **op.arguments(dict(batch=16, in_features=4096, out_features=4096, **fields), dtype=torch.bfloat16),
        )
    (launch,) = launches
    result = compile_launch(launch)
    print(result)
    assert result.spills == 0
    assert result.lane_instructions <= ceiling
