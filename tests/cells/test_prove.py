"""Which kernels ran: verdicts on planted traces, and on recipes that really run here."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.profiler_util import DeviceType

from effbench.cells.prove import find_idle, judge, list_kernels, prove
from effbench.checks import toy_run
from effbench.core.recipe import parse
from effbench.machine.trace import OpTrace, find_kind, sort_events, trace
from effbench.ops import list_ops, load

BACKENDS = [(name, backend) for name in list_ops() for backend in load(name).backends]


@pytest.mark.parametrize("name, backend", BACKENDS)
def test_every_backend_has_kernels_to_look_for(name, backend):
    assert list_kernels(load(name).backends[backend])


def launch(*kernels):
    return {"int_linear": OpTrace(1e-3, Counter(kernels))}


@pytest.mark.parametrize(
    "ran, traced, simulated, idle, verdict",
    [
        ({"int_linear": Counter(triton=9)}, launch("_int_linear_kernel"), False, "", "proven"),
        ({"int_linear": Counter(triton=9)}, launch("ampere_sgemm_128x64_tn"), False, "", "fallback"),  # a library's
        ({"int_linear": Counter(triton=9)}, {}, False, "", "fallback"),
        ({"int_linear": Counter(triton=9, reference=1)}, launch("_int_linear_kernel"), False, "", "fallback"),
        ({"int_linear": Counter(reference=9)}, launch(), False, "", "fallback"),
        ({}, {}, False, "model.layers.0.mlp.up_proj", "fallback"),
        ({}, {}, False, "", "proven"),
        ({"int_linear": Counter(triton=9)}, launch("_int_linear_kernel"), True, "", "simulated"),
    ],
)
def test_verdicts(ran, traced, simulated, idle, verdict):
    (name,) = {name.replace(r"\b", "") for name in list_kernels("effbench.kernels.int_linear.triton:int_linear")} or {
        ""
    }
    traced = {
        op: OpTrace(1e-3, Counter(one.replace("_int_linear_kernel", name) for one in each.kernels))
        for op, each in traced.items()
    }
    found, why = judge(ran, traced, simulated, idle)
    assert found == verdict and bool(why) == (verdict != "proven")


def event(name, parent=None, self_time=1.0, kernels=(), device=DeviceType.CPU):
    return SimpleNamespace(
        name=name, cpu_parent=parent, self_cpu_time_total=self_time, self_device_time_total=2 * self_time,
        kernels=[SimpleNamespace(name=kernel) for kernel in kernels], device_type=device,
    )  # fmt: skip


def test_kernels_belong_to_the_op_that_they_were_launched_in():
    ours = event("effbench::int_linear", kernels=["_int_linear"])
    inner = event("aten::mm", ours, kernels=["ampere_sgemm"])
    other = event("aten::mm", kernels=["sm90_xmma_gemm_f16"])
    on_device = event("_int_linear", device=DeviceType.CUDA)
    found = sort_events([ours, inner, other, event("aten::silu"), on_device], accelerated=True)
    assert found.ops["int_linear"].kernels == Counter({"_int_linear": 1, "ampere_sgemm": 1})
    assert found.ops["int_linear"].seconds == pytest.approx(4e-6)
    assert found.kinds == Counter({"matmul": pytest.approx(2e-6), "other": pytest.approx(2e-6)})
    assert found.seconds == pytest.approx(8e-6)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::addmm", "matmul"),
        ("void cutlass::Kernel2<sm90_xmma_gemm>", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("flash_fwd_splitkv_kernel", "attention"),
        ("aten::copy_", "copy"),
        ("vectorized_elementwise_kernel", "other"),
        ("aten::softmax", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert find_kind([name]) == kind


def test_a_trace_has_the_time_of_what_ran():
    big = torch.randn(400, 400)
    found = trace(lambda: [big @ big for _ in range(10)], torch.device("cpu"))
    assert found.kinds["matmul"] > 0.5 * found.seconds > 0 and not found.ops


def apply(steps):
    run = toy_run()
    for step in parse(steps).steps:
        run.apply(step)
    run.finish(recipe_is_empty=not steps)
    return run


@pytest.mark.parametrize(
    "steps, verdict, op",
    [("rtn(bits=4)", "fallback", "int_linear"), ("layer_pruning(fraction=0.5)", "proven", ""), ("", "proven", "")],
)
def test_recipes_here(steps, verdict, op):
    proof = prove(apply(steps), False, {})
    assert proof.verdict == verdict and list(proof.ops) == ([op] if op else [])
    shares = sum(proof.shares.values()) + sum(one["share"] for one in proof.ops.values())
    assert shares == pytest.approx(1, abs=0.01)
    if op:
        assert proof.ops[op]["backends"].keys() == {"reference"} and proof.ops[op]["share"] > 0


def test_packed_weights_that_meet_no_op_are_caught(monkeypatch):
    """A forward that decodes and multiplies by torch, as if no op were there: in every try."""
    run = apply("rtn(bits=4)")
    packed = type(next(module for _, module in run.model.named_modules() if find_idle(module)))
    assert find_idle(run.model) and not find_idle(apply("").model)
    kinds = {type(module) for module in run.model.modules() if hasattr(module, "dense_weight")}
    for kind in kinds:
        monkeypatch.setattr(kind, "forward", lambda self, x: torch.nn.functional.linear(x, self.dense_weight()))
    for _ in range(3):
        proof = prove(run, False, {})
        assert proof.verdict == "fallback" and "met no op" in proof.why, packed


def test_ops_of_the_probes_count_where_the_trace_has_none():
    proof = prove(apply(""), False, {"kv_quantize": Counter(reference=3)})
    assert proof.verdict == "fallback" and "kv_quantize" in proof.why
