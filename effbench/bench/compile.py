"""Kernels compiled for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effbench.bench.measure import describe_failure, plan_cases
from effbench.kernels._common.compiled import compile_launch
from effbench.kernels._common.launch import record_launches
from effbench.ops import Case, Op
from effbench.records.timings import CompiledRow


def compile_cases(names: Sequence[str]) -> list[CompiledRow]:
    """What every backend would launch for its timed cases on a GPU, compiled for sm_90 without one."""
    return [
        row
        for op, case in plan_cases(names, torch.device("cuda"))
        for backend in op.backends
        for row in _compile_case(op, case, backend)
    ]


def _compile_case(op: Op, case: Case, backend: str) -> list[CompiledRow]:
    rows: list[CompiledRow] = []

    def add(**fields: object) -> None:
        rows.append(CompiledRow(op=op.name, case=dict(case), name=backend, **fields))  # type: ignore[arg-type]

    try:
        with record_launches() as launches:
            op.run(backend, **op.describe_arguments(case, torch.bfloat16))
        for launch in launches:
            add(**compile_launch(launch)._asdict())
        if not launches:
            add(absent="launches no kernel of ours")
    except Exception as error:  # the compiler's, too
        add(**describe_failure(error))
    return rows
