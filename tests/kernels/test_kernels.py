"""Every op x backend x case: values, gradients, registration, dispatch, and what the compiler makes of it."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import types
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
from torch.sparse import _semi_structured_conversions as conversions
from torch.utils.flop_counter import FlopCounterMode

from effbench import ops as core
from effbench.core.errors import Usage
from effbench.core.paths import PACKAGE
from effbench.kernels._common.compiled import compile_launch
from effbench.kernels._common.launch import record_launches
from effbench.kernels.hadamard.matrices import base, factors
from effbench.kernels.int_linear import triton_w4
from effbench.kernels.int_linear.reference import IntMatrix
from effbench.kernels.kv_attend.cases import attention
from effbench.kernels.nm_linear import cusparselt
from effbench.ops import (
    Case,
    Declined,
    LinearOp,
    Op,
    backend_calls,
    flatten,
    list_ops,
    load,
    multiply,
    poison_memory,
    reset_backend_calls,
)

OPS = {name: load(name) for name in list_ops()}
CASES = [pytest.param(op, case, id=f"{name}-{i}") for name, op in OPS.items() for i, case in enumerate(op.cases)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One case of each kind of every op is enough for what does not depend on the numbers.
FEW = [pytest.param(op, op.cases[i], id=f"{name}-{i}") for name, op in OPS.items() for i in range(0, len(op.cases), 4)]


def test_ops_are_found_by_their_folders() -> None:
    folders = {path.parent.name for path in (PACKAGE / "kernels").glob("*/cases.py")}
    assert list_ops() == sorted(folders) and "int_linear" in folders
    with pytest.raises(Usage, match="int_linear"):
        load("int_linaer")


def test_listing_ops_imports_no_torch() -> None:
    code = "import sys; from effbench.ops import list_ops; list_ops(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_reference(op: Op, case: Case, dtype: torch.dtype) -> None:
    error, fine = op.check(case, "reference", dtype=dtype)
    assert fine, error


@pytest.mark.parametrize(("op", "case"), [case for case in CASES if case.values[0].gradient])
def test_gradient(op: Op, case: Case) -> None:
    error, fine = op.check_gradient(case)
    assert fine, error
    inputs = op.arguments(case)
    learned = inputs[op.differentiable[0]].requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        out = op(**inputs)
    if op.differentiable == ("x",):  # a linear op, which needs the shape of x alone
        assert learned.data_ptr() not in [one.data_ptr() for one in kept]
    out.sum().backward()  # a gradient of stride 0
    assert learned.grad is not None and learned.grad.isfinite().all()


@pytest.mark.parametrize(("op", "case"), FEW)
def test_registration(op: Op, case: Case) -> None:
    inputs = op.arguments(case)
    for name in op.differentiable[:1]:
        inputs[name].requires_grad_()
    kinds = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op.name != "fp8_linear":  # torch's schema check multiplies float8 tensors, which torch cannot
        kinds.append("test_schema")
    packet = getattr(torch.ops.effbench, op.name)
    outcome = torch.library.opcheck(packet.default, tuple(inputs.values()), test_utils=tuple(kinds))
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_compiles_whole_and_counts_what_ran(op: Op) -> None:
    inputs = op.arguments(op.cases[0])
    for name in op.differentiable[:1]:
        inputs[name].requires_grad_()
    eager = flatten(op(**inputs))
    reset_backend_calls()
    torch.compiler.reset()  # the ops share a code object, which is compiled only so many times
    whole = torch.compile(
        lambda kwargs: [out * 2 for out in flatten(op(**kwargs))], fullgraph=True, backend="aot_eager"
    )
    outs = whole(inputs)
    assert backend_calls() == {op.name: {"reference": 1}}
    assert all(torch.equal(out, plain * 2) for out, plain in zip(outs, eager, strict=True))
    for name in op.differentiable[:1]:
        outs[0].sum().backward()
        assert inputs[name].grad is not None


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_costs(op: Op) -> None:
    case = op.cases[3]
    inputs = op.arguments(case, dtype=torch.bfloat16)
    for name in op.differentiable[:1]:
        inputs[name].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        outs = flatten(op(**inputs))
        forward = counter.get_total_flops()
        for _ in op.differentiable[:1]:
            outs[0].sum().backward()
    assert forward == op.flops(case) and (forward > 0) == (op.flop_formula is not None)
    assert counter.get_total_flops() == (2 if op.differentiable else 1) * forward
    tensors = flatten([*inputs.values(), *(inputs[name] for name in op.mutates)])
    assert op.bytes(case, torch.bfloat16) == sum(tensor.nbytes for tensor in [*tensors, *outs])


def test_costs_of_a_real_shape_need_no_memory() -> None:
    case = dict(batch=1, in_features=8192, out_features=28672, bits=4, group_size=128, zero=True)
    assert OPS["int_linear"].flops(case) == 2 * 8192 * 28672
    assert OPS["int_linear"].bytes(case, torch.bfloat16) == pytest.approx(8192 * 28672 * 4.156 / 8, rel=1e-3)


class Plain(NamedTuple):
    """A matrix stored as it is."""

    weight: torch.Tensor

    def out_features(self, in_features: int) -> int:
        return self.weight.shape[0]

    def dense(self, in_features: int) -> torch.Tensor:
        return self.weight


def _toy(name: str, **backends: Any) -> Op:
    """x -> x W^T with the given functions as backends."""
    sys.modules[f"{name}_backends"] = types.ModuleType(f"{name}_backends")
    vars(sys.modules[f"{name}_backends"]).update(backends)
    return LinearOp(
        name=name,
        matrix=Plain,
        random=lambda case, dtype, on: Plain(torch.ones(4, 8, device=on["device"])),
        cases=[dict(batch=3, in_features=8)],
        backends={backend: f"{name}_backends:{backend}" for backend in backends},
    )


def test_a_kernel_that_leaves_memory_unwritten_fails_its_check() -> None:
    def careless(x: torch.Tensor, matrix: Plain) -> torch.Tensor:
        y = x.new_empty(len(x), len(matrix.weight))
        y[:, 1:] = multiply(x, matrix.weight[1:])
        return y

    def wrong_type(x: torch.Tensor, matrix: Plain) -> torch.Tensor:
        return multiply(x, matrix.weight).double()

    toy = _toy("toy_unwritten", careless=careless, wrong_type=wrong_type)
    assert not toy.check(toy.cases[0], "careless")[1]
    assert not toy.check(toy.cases[0], "wrong_type")[1]
    assert toy.check(toy.cases[0], "reference")[1]
    with poison_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(3)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_backends_are_tried_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        """Stands for a tensor on an accelerator, as far as dispatch looks at one."""

        is_cuda, device = True, "cuda:0"

        def __init__(self, rows: int) -> None:
            self.rows = rows

    def run(self: Op, backend: str, x: Any, **rest: Any) -> str:
        if backend == "picky" and x.rows > 1:
            raise Declined
        return backend

    monkeypatch.setattr(torch.cuda, "device", lambda _: warnings.catch_warnings())
    monkeypatch.setattr(core.Op, "run", run)
    both, one = _toy("toy_order", picky=None, eager=None), _toy("toy_only", picky=None)
    assert both._dispatch(OnDevice(1), None) == "picky"  # type: ignore[arg-type]
    assert both._dispatch(OnDevice(2), None) == "eager"  # type: ignore[arg-type]
    assert one._dispatch(OnDevice(2), None) == "reference"  # type: ignore[arg-type]


@pytest.mark.parametrize("m", [1, 12, 20, 28, 36, 44, 52, 60, 108, 116, 140, 156, 172])
def test_hadamard_matrices(m: int) -> None:
    matrix = base(m).astype(int)
    assert set(np.unique(matrix)) <= {-1, 1}
    assert np.array_equal(matrix @ matrix.T, m * np.eye(m))


@pytest.mark.parametrize(
    ("n", "expected"),
    {128: 1, 384: 12, 768: 12, 8192: 1, 11008: 172, 12288: 12, 13824: 108, 14336: 28, 28672: 28}.items(),
)
def test_hadamard_sizes_in_use(n: int, expected: int) -> None:
    assert factors(n) == (n // expected, expected)


@pytest.mark.parametrize("n", [3, 6, 92, 100, 202])
def test_hadamard_sizes_without_a_matrix(n: int) -> None:
    with pytest.raises(ValueError, match=str(n)):
        OPS["hadamard"](torch.ones(n))


@pytest.mark.parametrize("n", [2, 56, 384, 11008])
def test_hadamard_is_orthonormal(n: int) -> None:
    x = torch.randn(2, n)
    y = OPS["hadamard"](x)
    assert y.abs().max() < 6  # spread out
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(OPS["hadamard"](y, transpose=True), x, atol=1e-4, rtol=0)


def test_fp8_rounding_saturates_and_shows_what_is_not_finite() -> None:
    x = torch.randn(3, 16)
    x[1, 2], x[2, 3] = torch.inf, torch.nan
    weight = torch.ones(4, 16).to(torch.float8_e4m3fn)
    y = OPS["fp8_linear"](x, weight, torch.ones(4, 1), "token")
    assert y[0].isfinite().all() and not y[1:].isfinite().any()
    assert not OPS["fp8_linear"](x, weight, torch.ones(4, 1), "tensor").isfinite().any()
    assert OPS["fp8_linear"](1e30 * x[:1], weight, torch.ones(4, 1), "token").isfinite().all()
    assert (OPS["fp8_linear"](0 * x[:1], weight, torch.ones(4, 1), "token") == 0).all()


INTERPRETED = """
import json, sys, torch
from effbench.ops import Declined, load
rows = []
for name, backend, number, dtype in json.loads(sys.argv[1]):
    op = load(name)
    try:
        outcome = op.check(op.cases[number], backend, dtype=getattr(torch, dtype))
    except Declined:
        outcome = None
    rows.append([name, backend, number, dtype, outcome])
print(json.dumps(rows))
"""


def _taken(name: str, backend: str, case: Case, dtype: str) -> bool:
    """Whether a backend in Triton is there for `case`: the first one of an op is for all."""
    if backend == "triton":
        return True
    assert (name, backend) == ("int_linear", "triton_w4")
    rows = case["batch"] if isinstance(case["batch"], int) else math.prod(case["batch"])
    size = case.get("group_size", case["in_features"])
    return (
        case["bits"] == 4
        and dtype != "float32"
        and rows <= 64
        and (size >= case["in_features"] or size % 32 == 0)
        and not case.get("g_idx")
        and not case.get("per_tensor")
    )


# Every case of every backend in Triton, in each type that the interpreter computes rightly: bfloat16 is not one.
IN_TRITON = [
    (name, backend, number, dtype)
    for name, op in OPS.items()
    for backend in op.backends
    if backend.startswith("triton")
    for number in range(len(op.cases))
    for dtype in ("float32", "float16")
]


@pytest.mark.parametrize("third", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_triton_in_the_interpreter(third: int) -> None:
    """Two of three cases in one of the types; slow tests have the rest."""
    cases = IN_TRITON[third::3]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row for row in rows if row[4] is not None and not row[4][1]] == []
    taken = [(name, backend, number, dtype) for name, backend, number, dtype, outcome in rows if outcome]
    assert taken == [entry for entry in cases if _taken(entry[0], entry[1], OPS[entry[0]].cases[entry[2]], entry[3])]
    assert {(name, backend) for name, backend, *_ in taken} >= {("int_linear", "triton_w4"), ("int_linear", "triton")}


def _shape(batch: int, **fields: Any) -> dict[str, Any]:
    return dict(batch=batch, in_features=4096, out_features=4096) | fields


W4 = [
    (_shape(batch, bits=4, zero=True, dtype=dtype, in_features=width, out_features=out, group_size=128), *ceilings)
    for width, out in ((14336, 4096), (8192, 28672))
    for batch, dtype, *ceilings in [
        (1, torch.bfloat16, 2.57, 2.55),
        (1, torch.float16, 2.57, 2.55),
        (8, torch.bfloat16, 2.72, 2.71),
        (16, torch.bfloat16, 3.01, 3.0),
        (64, torch.bfloat16, 3.69, 3.67),
    ]
]

# Rows enough for one program each. Both branches of the loop count, of which most blocks of tokens take one.
ATTENTION = [
    (attention(600, heads, width, 30, 64, 896, (bits, bits)) | dict(dtype=dtype), *ceilings)
    for heads, width, bits, dtype, *ceilings in [
        (4, 128, 4, torch.bfloat16, 22.1, 19.7),
        (4, 128, 2, torch.bfloat16, 21.5, 18.9),
        (4, 128, 8, torch.bfloat16, 22.2, 20.2),
        (1, 64, 4, torch.float16, 25.9, 22.3),
        (16, 256, 4, torch.bfloat16, 21.0, 19.9),
        (8, 128, 4, torch.float32, 81.3, 75.3),
    ]
]

# What each kernel was compiled to when it was written: lane-instructions per weight, in the loop over the inputs;
# hadamard: per number, of the whole code or, for sizes with an odd factor, of one step of its loop. Lower
# a ceiling when a kernel gets better; a rise needs a reason. One column for each version of Triton in use.
VERSIONS = ("3.6", "3.7")
CEILINGS = [
    ("int_linear", _shape(1, bits=2, group_size=128, zero=True), 12.7, 12.9),
    ("int_linear", _shape(1, bits=3, group_size=128, zero=True), 18.9, 20.4),
    ("int_linear", _shape(1, bits=4, group_size=128, zero=True), 12.9, 13.0),
    ("int_linear", _shape(1, bits=8), 9.5, 9.5),
    ("int_linear", _shape(16, bits=4, group_size=128, zero=True), 21.3, 16.6),
    *(("int_linear:triton_w4", case, *ceilings) for case, *ceilings in W4),
    ("lut_linear", _shape(1, bits=4, block=64), 13.4, 13.2),
    ("lut_linear", _shape(1, bits=3, per_row=1, outliers=18), 19.9, 19.2),
    ("lut_linear", _shape(16, bits=4, block=64), 10.2, 11.3),
    ("e8p_linear", _shape(1, bits=2), 28.0, 16.6),
    ("e8p_linear", _shape(1, bits=3), 36.5, 23.2),
    ("e8p_linear", _shape(1, bits=4), 58.2, 31.2),
    ("e8p_linear", _shape(16, bits=2), 31.9, 32.4),
    ("nm_linear", _shape(1, n=2, m=4), 23.7, 24.0),
    ("nm_linear", _shape(16, n=2, m=4), 28.5, 23.3),
    ("nm_int_linear", _shape(1, n=2, m=4, bits=4, group_size=128, zero=True), 35.5, 41.5),
    ("nm_int_linear", _shape(16, n=2, m=4, bits=4, group_size=128, zero=True), 67.3, 50.4),
    ("csr_linear", _shape(1, number=2**18), 16.4, 16.4),
    ("bitmask_linear", _shape(1, number=2**23), 23.6, 30.3),
    ("bitmask_linear", _shape(16, number=2**23), 25.8, 43.5),
    ("bcsr_linear", _shape(1, block=(16, 16), number=2**12), 6.2, 6.2),
    ("bcsr_linear", _shape(1, block=(8, 4), number=2**12), 7.9, 8.4),
    ("bcsr_linear", _shape(1, block=(1, 8), number=2**12), 18.3, 22.0),
    ("bcsr_linear", _shape(16, block=(16, 16), number=2**12), 5.5, 5.7),
    ("bcsr_linear", _shape(16, block=(8, 4), number=2**12), 11.7, 12.3),
    ("fp8_linear", _shape(1, activations="none"), 5.5, 5.5),
    ("fp8_linear", _shape(16, activations="token"), 3.3, 3.3),
    ("hadamard", dict(batch=16, in_features=4096), 24.8, 24.8),
    ("hadamard", dict(batch=16, in_features=11008), 27.3, 27.3),
    ("hadamard", dict(batch=16, in_features=14336), 22.1, 22.1),
    *(("kv_attend", case, *ceilings) for case, *ceilings in ATTENTION),
]


@pytest.mark.skipif(triton.__version__[:3] not in VERSIONS, reason="no ceilings for this version of Triton")
@pytest.mark.parametrize(
    ("name", "case", "ceilings"),
    [
        pytest.param(
            name,
            case,
            ceilings,
            id=f"{name}-{'-'.join(f'{k}={v}' for k, v in case.items())}",
            marks=[pytest.mark.slow] if name in {other for other, *_ in CEILINGS[:place]} else [],  # but the first
        )
        for place, (name, case, *ceilings) in enumerate(CEILINGS)
    ],
)
def test_compiled_for_hopper(name: str, case: Case, ceilings: list[float]) -> None:
    name, _, backend = name.partition(":")
    with record_launches() as launches:
        OPS[name].run(backend or "triton", **OPS[name].arguments(case, dtype=case.get("dtype", torch.bfloat16)))
    results = [compile_launch(launch) for launch in launches]
    print(*results, sep="\n")
    assert all(result.spills == 0 and result.shared <= 227 * 1024 for result in results)
    assert results[0].lane_instructions <= ceilings[VERSIONS.index(triton.__version__[:3])]
    if backend:
        assert results[0].matrix_products > 0 and results[0].wide_loads > 0.5
    else:
        assert len(results) == 1
    if case.get("batch", 2) > 1 and name != "hadamard":
        assert results[0].matrix_products > 0


W4_CASES = [case for case in OPS["int_linear"].cases if _taken("int_linear", "triton_w4", case, "bfloat16")]


@pytest.mark.slow
@pytest.mark.parametrize("case", W4_CASES, ids=str)
def test_w4_compiles_for_every_kind_of_case(case: Case) -> None:
    with record_launches() as launches:
        OPS["int_linear"].run("triton_w4", **OPS["int_linear"].arguments(case, dtype=torch.bfloat16))
    assert all(compile_launch(launch).spills == 0 for launch in launches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_w4_compiles_for_the_first_gpus_with_bfloat16(dtype: torch.dtype) -> None:
    with record_launches() as launches:
        OPS["int_linear"].run("triton_w4", **OPS["int_linear"].arguments(W4_CASES[0], dtype=dtype))
    assert compile_launch(launches[0], capability=80).matrix_products > 0


def test_w4_splits_the_input_until_there_are_programs_enough() -> None:
    grids = {}
    for batch, out in ((1, 4096), (1, 28672), (64, 4096)):
        case = dict(batch=batch, in_features=8192, out_features=8, bits=4, group_size=128)
        arguments = OPS["int_linear"].arguments(case)
        arguments["x"] = arguments["x"].bfloat16()
        for name in ("weight", "scale"):
            arguments[name] = arguments[name][:1].expand(out, -1)
        with record_launches() as launches:
            OPS["int_linear"].run("triton_w4", **arguments)
        assert launches[0].constants["TILES"] * launches[0].grid[1] == 64  # each of 128 inputs
        assert [launch.kernel.fn.__name__ for launch in launches] == ["_w4_linear", "_sum_splits"]
        grids[batch, out] = launches[0].grid
    assert all(math.prod(grid) >= 1.5 * 132 for grid in grids.values())
    assert grids[1, 4096][1] > grids[1, 28672][1] > 1


def test_w4_without_splits_needs_no_second_launch() -> None:
    case = dict(batch=16, in_features=256, out_features=64, bits=4, group_size=128)
    with record_launches() as launches:
        OPS["int_linear"].run("triton_w4", **OPS["int_linear"].arguments(case, dtype=torch.float16))
    (launch,) = launches
    assert launch.grid == (1, 1, 1) and launch.arguments[4].dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({}, "triton_w4"),
        ({"group_size": None}, "triton_w4"),
        ({"group_size": 32}, "triton_w4"),
        ({"group_size": 96}, "triton_w4"),
        ({"batch": 64}, "triton_w4"),
        ({"batch": [4, 8]}, "triton_w4"),
        ({"batch": 65}, "triton"),
        ({"batch": 0}, "triton"),
        ({"bits": 3}, "triton"),
        ({"bits": 8}, "triton"),
        ({"group_size": 16}, "triton"),
        ({"g_idx": True}, "triton"),
        ({"group_size": None, "per_tensor": True}, "triton"),
        ({"dtype": torch.float32}, "triton"),
    ],
    ids=str,
)
def test_which_kernel_multiplies_by_integers(change: Case, backend: str) -> None:
    op = OPS["int_linear"]
    case = dict(batch=1, in_features=128, out_features=40, bits=4, group_size=64, zero=True) | change
    arguments = op.arguments(case, dtype=case.get("dtype", torch.bfloat16))
    chosen = []
    for name in op.backends:
        with record_launches() as launches:
            try:
                op.run(name, **arguments)
            except Declined:
                assert launches == []  # before it computes
                continue
        chosen.append(name)
    assert chosen[0] == backend and chosen[-1] == "triton"


def _attend(case: Case, dtype: torch.dtype = torch.bfloat16, **change: Any) -> list[Any]:
    """The launches that attention of a case makes."""
    op = OPS["kv_attend"]
    with record_launches() as launches:
        op.run("triton", **op.arguments(case, dtype=dtype) | change)
    return launches


def test_attention_shares_tokens_until_there_are_programs_enough() -> None:
    grids = {}
    for rows, units in ((1, 126), (32, 126), (600, 126), (1, 1)):
        launches = _attend(attention(rows, 2, 64, units, 64, 32 * units))
        assert [launch.kernel.fn.__name__ for launch in launches] == ["_kv_attend", "_merge"][: len(launches)]
        (first, splits), blocks = launches[0].grid, launches[0].arguments[-1]
        tokens = 32 * units + 64
        assert first == rows and (splits - 1) * blocks * 64 < tokens <= splits * blocks * 64
        assert (splits > 1) == (len(launches) == 2)
        grids[rows, units] = splits
    assert grids == {(1, 126): 16, (32, 126): 16, (600, 126): 1, (1, 1): 1}


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (attention(1, 2, 64, 2, 9, 41), torch.float64, "float32"),
        (attention(1, 2, 96, 2, 9, 41, size=24), torch.bfloat16, "units of 24"),
        (attention(1, 17, 64, 2, 9, 41), torch.bfloat16, "17 heads"),
        (attention(1, 2, 512, 2, 9, 41), torch.bfloat16, "512 channels"),
        (attention(1, 2, 256, 2, 9, 41), torch.float32, "256 channels"),
    ],
    ids=str,
)
def test_attention_declines(case: Case, dtype: torch.dtype, reason: str) -> None:
    with pytest.raises(Declined, match=reason):
        _attend(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*OPS["kv_attend"].cases, attention(1, 8, 256, 4000, 64, 128000)], ids=str)
def test_attention_compiles_for_every_kind_of_case(case: Case, dtype: torch.dtype) -> None:
    if case["width"] > 128 and dtype == torch.float32:
        return  # declined
    for launch in _attend(case, dtype):
        assert compile_launch(launch).spills == 0


def _sparse(rows: int = 20, **change: Any) -> dict[str, Any]:
    case = dict(batch=rows, in_features=128, out_features=64, n=2, m=4) | change
    return OPS["nm_linear"].arguments(case, dtype=case.get("dtype", torch.float16))


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch's own conversions in place of the library, with the calls that were made."""
    calls = []

    def compress(dense: torch.Tensor) -> torch.Tensor:
        calls.append("compress")
        sparse, meta = conversions.sparse_semi_structured_from_dense_cutlass(dense)
        return torch.cat([sparse.view(torch.int16), meta], dim=1)

    def multiply(packed: torch.Tensor, dense: torch.Tensor, transpose_result: bool) -> torch.Tensor:
        calls.append("multiply")
        assert transpose_result and dense.shape[1] % 8 == 0
        split = dense.shape[0] // 2
        sparse = packed[:, :split].contiguous().view(dense.dtype)
        meta = packed[:, split:].contiguous()
        return (conversions.sparse_semi_structured_to_dense_cutlass(sparse, meta).float() @ dense.float()).T.to(dense)

    monkeypatch.setattr(cusparselt, "_has_cusparselt", lambda device: True)
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cusparselt_gets_the_matrix_and_padded_rows(vendor: list[str], dtype: torch.dtype) -> None:
    for batch in (20, [2, 9], 32):
        error, fine = OPS["nm_linear"].check(
            dict(batch=batch, in_features=128, out_features=64, n=2, m=4), "cusparselt", dtype=dtype
        )
        assert fine, error
    assert vendor == ["compress", "multiply"] * 3


def test_cusparselt_compresses_once_and_again_after_a_change(vendor: list[str]) -> None:
    inputs, op = _sparse(), OPS["nm_linear"]
    first = op.run("cusparselt", **inputs)
    assert torch.equal(op.run("cusparselt", **inputs), first)
    assert vendor == ["compress", "multiply", "multiply"]
    inputs["values"].mul_(2)
    assert torch.equal(op.run("cusparselt", **inputs), 2 * first)
    op.run("cusparselt", **inputs | {"places": inputs["places"].clone()})
    assert vendor.count("compress") == 3
    held = len(cusparselt._known)
    del inputs
    gc.collect()
    assert len(cusparselt._known) == held - 1


def test_cusparselt_does_not_compress_inside_a_capture(vendor: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, op = _sparse(), OPS["nm_linear"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(Declined, match="capture"):
        op.run("cusparselt", **inputs)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    op.run("cusparselt", **inputs)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    op.run("cusparselt", **inputs)
    assert vendor == ["compress", "multiply", "multiply"]


@pytest.mark.parametrize(
    "change",
    [{"rows": 15}, {"n": 1}, {"n": 4, "m": 8}, {"dtype": torch.float32}, {"out_features": 33}, {"in_features": 120}],
    ids=str,
)
def test_cusparselt_declines(vendor: list[str], change: dict[str, Any]) -> None:
    with pytest.raises(Declined):
        OPS["nm_linear"].run("cusparselt", **_sparse(**change))
    assert vendor == []


def test_cusparselt_declines_where_it_is_not() -> None:
    with pytest.raises(Declined, match="no cuSPARSELt"):
        OPS["nm_linear"].run("cusparselt", **_sparse())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_backends_on_the_device(op: Op, case: Case, dtype: torch.dtype) -> None:
    for backend in op.backends:
        try:
            error, fine = op.check(case, backend, device="cuda", dtype=dtype)
        except Declined:
            continue
        assert fine, (backend, error)


WITH_TRITON = {name: op for name, op in OPS.items() if "triton" in op.backends}


@pytest.mark.gpu
@pytest.mark.parametrize("op", WITH_TRITON.values(), ids=WITH_TRITON)
def test_dispatch_and_graphs_on_the_device(op: Op) -> None:
    inputs = op.arguments(op.cases[0], device="cuda", dtype=torch.bfloat16)
    reset_backend_calls()
    op(**inputs)
    assert backend_calls() == {op.name: {"triton": 1}}  # the first cases are not for special backends
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = flatten(op(**inputs))
    first = next(iter(inputs))  # what it is of: x, or the query
    for seed in (1, 2):
        inputs[first].copy_(op.arguments(op.cases[0], device="cuda", dtype=torch.bfloat16, seed=seed)[first])
        graph.replay()
        assert all(torch.equal(out, again) for out, again in zip(outs, flatten(op(**inputs)), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*W4_CASES, *(case for case, *_ in W4)], ids=str)
def test_w4_decodes_alike_with_and_without_ptx_on_the_device(case: Case, dtype: torch.dtype) -> None:
    op = OPS["int_linear"]
    arguments = op.arguments(case, device="cuda", dtype=dtype)
    x, matrix = arguments.pop("x"), IntMatrix(**arguments)
    assert torch.equal(*(triton_w4.int_linear(x, matrix, ptx=ptx) for ptx in (True, False)))
    error, fine = op.check(case, "triton_w4", device="cuda", dtype=dtype)
    assert fine, error


@pytest.mark.gpu
def test_kernels_of_real_layers_are_captured_on_the_device() -> None:
    cases = {
        "int_linear": (_shape(1, bits=4, group_size=128, zero=True), "triton_w4"),
        "nm_linear": (_shape(64, n=2, m=4), "cusparselt"),
    }
    for name, (case, backend) in cases.items():
        op = OPS[name]
        inputs = op.arguments(case, device="cuda", dtype=torch.bfloat16)
        if backend == "cusparselt" and not cusparselt._has_cusparselt(inputs["x"].device):
            continue
        reset_backend_calls()
        op(**inputs)
        assert backend_calls() == {name: {backend: 1}}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(**inputs)
        inputs["x"].mul_(2)
        graph.replay()
        assert torch.equal(out, op(**inputs))
        assert backend_calls() == {name: {backend: 3}}


@pytest.mark.parametrize(("op", "case"), [case for case in FEW if isinstance(case.values[0], LinearOp)])
def test_autocast_is_that_of_the_input_alone(op: LinearOp, case: Case) -> None:
    """Whether something looks on or not: a counter of operations takes autocast away inside of ops."""
    inputs = op.arguments(case)
    narrow = inputs | {"x": inputs["x"].bfloat16()}
    expected = op(**narrow)
    with torch.autocast("cpu", torch.bfloat16):
        plain = op(**inputs)
        with FlopCounterMode(display=False):
            looked = op(**inputs)
        wide = op(**inputs | {"x": inputs["x"].double()})
    assert plain.dtype == torch.bfloat16 and torch.equal(plain, expected) and torch.equal(looked, expected)
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("name", ["soft_kl", "generalized_jsd", "clipped_policy"])
def test_autocast_does_not_reach_into_losses(name: str) -> None:
    op = OPS[name]
    inputs = op.arguments(op.cases[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = flatten(op(**inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, flatten(op(**inputs)), strict=True))
