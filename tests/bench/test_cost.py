"""What the harness itself costs. `tox -e bench` prints the figures; targets are printed beside them, not asserted."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

import pytest
import torch

from effbench.cells.local import Local
from effbench.cells.options import RunOptions
from effbench.cells.plan import plan
from effbench.cells.run import run_cells
from effbench.formats.compensation import inverse_factor
from effbench.formats.grid import Grid, fit_grid
from effbench.methods.prune import sparsegpt
from effbench.methods.prune._common import keep_mask
from effbench.methods.quant.gptq import solve
from effbench.records.record import Record
from effbench.records.store import Store

pytestmark = pytest.mark.slow

HARNESS = ("wait", "open", "finish")  # phases of a cell that are neither its method nor its probes


def test_quick_quant_suite(benchmark, tmp_path, capsys):
    """The whole command as a user types it, on all cores."""

    def command():
        done = subprocess.run(
            [sys.executable, "-m", "effbench", "run", "suite=quant", "tier=quick", f"results={tmp_path}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    benchmark.pedantic(command, rounds=1)
    with capsys.disabled():
        print(f"\nquick quant suite: {benchmark.stats['mean']:.0f} s (target under 300 s)")


def test_overhead_per_cell(benchmark, tmp_path, capsys):
    """Wall time of cells run one after the other, less what methods and probes took."""
    options = RunOptions(suite="quant", recipes="rtn-*", tier="quick", jobs=1, limit=20, results=str(tmp_path))
    todo = plan(options).todo
    records: list[Record] = []
    warm = Local(jobs=1, timeout=600)
    run_cells(todo[:1], Store(tmp_path), warm)  # starts the fork-server

    def command():
        found, stopped = run_cells(todo[1:], Store(tmp_path), warm)
        assert not stopped
        records.extend(found)

    benchmark.pedantic(command, rounds=1)
    assert {record.outcome for record in records} == {"ok"}
    work = sum(s for r in records for phase, s in r.log["phases"].items() if phase not in HARNESS)
    overhead = (benchmark.stats["mean"] - work) / len(records)
    with capsys.disabled():
        print(f"\noverhead per cell: {overhead:.2f} s over {len(records)} cells (target under 1 s)")


@pytest.fixture(scope="module")
def matrix():
    """A 4096 x 4096 weight with the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    n = 4096
    weight = torch.randn(n, n, generator=generator) * 0.02
    inputs = torch.randn(2 * n, n, generator=generator)
    return weight, 2 * inputs.T @ inputs / len(inputs)


def test_gptq_of_one_matrix(benchmark, matrix, capsys):
    """Factorisation and solver from a given Hessian, group 128, beside llm-compressor where it is installed."""
    weight, hessian = matrix
    size = 128
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    fitted = fit_grid(weight.unflatten(1, (-1, size)), 4)
    columns = zip(fitted.scale[..., 0].T, fitted.zero[..., 0].T, strict=True)
    grids = [Grid(scale.contiguous(), zero.contiguous(), 4) for scale, zero in columns]

    def ours():
        return solve(weight, inverse_factor(hessian, 0.01, "matrix"), lambda column, _: grids[column // size])

    try:
        benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
        best = benchmark.stats["min"]
        theirs = peer(weight, hessian, fitted, size)
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        beside = "llm-compressor n/a"
        if theirs is not None:
            beside = f"llm-compressor {theirs:.2f} s, ratio {best / theirs:.2f} (target at most 1)"
        print(f"\nGPTQ 4096 x 4096, 4 bits, group 128, 2 threads: {best:.2f} s, {beside}")


def test_sparsegpt_of_one_matrix(benchmark, matrix, capsys):
    """Factorisation and solver from a given Hessian at 50 %, beside llm-compressor where it is installed."""
    weight, hessian = matrix
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    theirs = None
    try:
        benchmark.pedantic(
            lambda: sparsegpt.solve(weight, inverse_factor(hessian, 0.01, "matrix"), 0.5), rounds=3, warmup_rounds=1
        )
        with contextlib.suppress(ImportError), torch.no_grad():
            from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight as theirs_of

            linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
            linear.weight.data = weight
            theirs = min(
                timed(lambda: theirs_of(linear, {linear: hessian.clone()}, 0.5, 0, 0, 128, 0.01, False))
                for _ in range(3)
            )
    finally:
        torch.set_num_threads(threads)
    best = benchmark.stats["min"]
    with capsys.disabled():
        beside = "llm-compressor n/a"
        if theirs is not None:
            beside = f"llm-compressor {theirs:.2f} s, ratio {best / theirs:.2f} (target at most 1)"
        print(f"\nSparseGPT 4096 x 4096, 50 %, 2 threads: {best:.2f} s, {beside}")


def test_wanda_mask_beside_a_sort(benchmark, matrix, capsys):
    """Score and mask of one matrix, beside a plain sort of its scores row by row."""
    weight, hessian = matrix
    norm = hessian.diagonal().sqrt()
    benchmark.pedantic(lambda: keep_mask(weight.abs() * norm, 0.5, scope="row"), rounds=3, warmup_rounds=1)
    plain = min(timed(lambda: (weight.abs() * norm).sort(dim=1)) for _ in range(3))
    best = benchmark.stats["min"]
    with capsys.disabled():
        print(f"\nWanda mask 4096 x 4096: {best:.2f} s, sorting alone {plain:.2f} s, ratio {best / plain:.2f}")


def timed(work) -> float:
    """Seconds that one call took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peer(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, size: int) -> float | None:
    """Best of three of llm-compressor's solver on the same grids, or None where it is not installed."""
    try:
        from compressed_tensors.quantization import QuantizationArgs
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    except ImportError:
        return None
    arguments = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=size)
    scale, zero = grid.scale[..., 0], grid.zero[..., 0] - 8
    best = float("inf")
    for _ in range(3):
        batch = (weight[None].clone(), hessian[None].clone(), scale[None], zero[None].to(torch.int8))
        best = min(best, timed(lambda batch=batch: quantize_weight(*batch, None, arguments)))
    return best
