"""Which kernels a cell's artifact really runs on: dispatch, and a short trace of one prefill and two decoding steps.

| verdict | what |
| --- | --- |
| `proven` | every op that ran, ran by a backend whose own kernels are in the trace, and nothing packed met no op |
| `fallback` | an op ran by its reference, or its backend's kernels are not in the trace, or packed weights met no op |
| `simulated` | the recipe computes like its compressed form without being stored as it |

A recipe that changes nothing in how products are computed (layers left out, merged adapters) runs on the kernels of
torch and is proven by them.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effbench.ops import backend_calls, load

if TYPE_CHECKING:
    from effbench.machine.trace import OpTrace, Trace
    from effbench.nn.run import ModelRun

Verdict = Literal["proven", "fallback", "simulated"]

TOKENS, TOKENS_SLOW, STEPS = 160, 4, 2  # more than the newest tokens that caches leave as they are
REFERENCE = "reference"
PACKED = 0.9  # of the bytes of a dense matrix of 16 bits: what takes less claims that something decodes it


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the trace says."""

    verdict: Verdict
    why: str  # of a verdict other than proven
    ops: dict[str, dict[str, Any]]  # backends and calls of each, its share of the time, its device kernels
    shares: dict[str, float]  # of the time, by kind of kernel; that of ops is theirs


def prove(run: ModelRun, simulated: bool, measured: Mapping[str, Counter[str]]) -> Proof:
    """Trace the run's model as it infers; `measured` has calls of each op by backend while probes were taken.

    Raises `Unsupported` or `Refused` where the model cannot infer.
    """
    import torch

    from effbench.machine.trace import trace
    from effbench.nn.infer.engine import open_engine
    from effbench.probes.inputs import random_ids, slow

    engine = open_engine(run)
    tokens = min(TOKENS_SLOW if slow(run) else TOKENS, engine.max_length - STEPS - 1)
    ids = random_ids(run, 1, tokens)

    def infer() -> None:
        state = engine.prefill(ids)
        for _ in range(STEPS):
            state = engine.decode(state)

    with torch.inference_mode():
        infer()  # compiles what is lazy
        before = backend_calls()
        found = trace(infer, run.device)
    ran = count_calls(before)
    every = {op: ran.get(op, Counter()) + measured.get(op, Counter()) for op in {*ran, *measured}}
    verdict, why = judge(every, found.ops, simulated, find_idle(run.model) if not every else "")
    return Proof(verdict, why, _describe_ops(ran, found), _share(found))


def count_calls(before: Mapping[str, Mapping[str, int]]) -> dict[str, Counter[str]]:
    """Calls of each op by backend since `before`; ops without any are left out."""
    since = {op: Counter(calls) - Counter(before.get(op, {})) for op, calls in backend_calls().items()}
    return {op: calls for op, calls in since.items() if calls}


def judge(
    ran: Mapping[str, Counter[str]], traced: Mapping[str, OpTrace], simulated: bool, idle: str = ""
) -> tuple[Verdict, str]:
    """The verdict and its reason: `ran` has calls of each op by backend, `idle` names packed weights that met no op."""
    if simulated:
        return "simulated", "computes like the compressed form without being stored as it"
    for op, calls in sorted(ran.items()):
        for backend in sorted(calls):
            if backend == REFERENCE:
                return "fallback", f"{op} ran by its reference"
            launched = traced[op].kernels if op in traced else ()
            own = "|".join(sorted(list_kernels(load(op).backends[backend])))
            if not any(re.search(own, kernel) for kernel in launched):
                return "fallback", f"{op} ran by {backend}, whose kernels ({own}) are not in the trace"
    if idle:
        return "fallback", f"{idle} is stored packed and met no op"
    return "proven", ""


def list_kernels(backend: str) -> set[str]:
    """Patterns of the names of the device kernels of a backend: functions of its module under `triton.jit`, or what the
    module calls `KERNELS` where they are those of a vendor's library.
    """
    spec = importlib.util.find_spec(backend.partition(":")[0])
    assert spec is not None and spec.origin is not None, backend
    names: set[str] = set()
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(mark) for mark in node.decorator_list):
            names.add(rf"\b{node.name}\b")
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KERNELS":
            names.add(ast.literal_eval(node.value))
    return names


def find_idle(model: Any) -> str:
    """The path of a linear that is stored in less than a dense matrix of 16 bits takes; empty where there is none."""
    import torch

    from effbench.nn.model.linear import Replaced, stored_bytes

    for path, module in model.named_modules():
        if isinstance(module, Replaced):
            dense = 2 * module.in_features * module.out_features
            if sum(stored_bytes(module, torch.float16)) < PACKED * dense:
                return str(path)
    return ""


def _describe_ops(ran: dict[str, Counter[str]], found: Trace) -> dict[str, dict[str, Any]]:
    whole = found.seconds or 1.0
    described: dict[str, dict[str, Any]] = {}
    for op, calls in sorted(ran.items()):
        described[op] = {"backends": dict(calls)}
        if op in found.ops:
            described[op]["share"] = round(found.ops[op].seconds / whole, 4)
            if found.ops[op].kernels:
                described[op]["kernels"] = [name[:100] for name, _ in found.ops[op].kernels.most_common(5)]
    return described


def _share(found: Trace) -> dict[str, float]:
    whole = found.seconds or 1.0
    return {kind: round(seconds / whole, 4) for kind, seconds in sorted(found.kinds.items())}
