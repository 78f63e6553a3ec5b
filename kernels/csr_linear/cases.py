"""What `csr_linear` is called with, and how it is checked."""

from typing import Any

import torch
from torch import Tensor

from effbench.kernels._common.dense import activations, adjoint
from effbench.kernels._common.shapes import timed
from effbench.kernels.csr_linear.reference import csr_linear, dense
from effbench.ops import Case, Op


def scattered(case: Case, rows: int, columns: int, device: torch.device, generator: torch.Generator) -> list[Tensor]:
    """Random crow and col of `number` entries; `uneven`: every third row is empty, the others differ in length."""
    score = torch.rand(rows, columns, device=device, generator=generator)
    if case.get("uneven"):
        score *= torch.arange(rows, device=device)[:, None] % 3
    entry = score.flatten().topk(case["number"]).indices.sort().values
    crow = torch.searchsorted(entry, torch.arange(rows + 1, device=device) * columns, out_int32=True)
    return [crow, (entry % columns).to(torch.int32 if case.get("wide") else torch.int16)]


def inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Fields of a case: batch, in_features, out_features, number of entries; uneven, wide (int32 columns)."""
    crow, col = scattered(case, case["out_features"], case["in_features"], device, generator)
    return {
        "x": activations(case, device, dtype, generator),
        "crow": crow,
        "col": col,
        "values": torch.randn(case["number"], device=device, generator=generator).to(dtype),
    }


def _case(batch: int | list[int], in_features: int, out_features: int, number: int, **more: bool) -> Case:
    return dict(batch=batch, in_features=in_features, out_features=out_features, number=number, **more)


OP = Op(
    name="csr_linear",
    reference=csr_linear,
    adjoint=adjoint(dense),
    out_features=lambda x, crow, *_: crow.shape[0] - 1,
    inputs=inputs,
    cases=[
        _case(1, 128, 33, 2112),
        _case(1, 300, 18, 1800, uneven=True),
        _case(1, 77, 1, 40, wide=True),
        _case(3, 45, 17, 250, uneven=True),
        _case(3, 96, 40, 3840),  # everything kept
        _case(17, 256, 65, 5000, uneven=True, wide=True),
        _case(17, 40, 96, 7),
        _case(40, 64, 9, 200, wide=True),
        _case([2, 3], 45, 7, 100, uneven=True),
    ],
    backends={"triton": "effbench.kernels.csr_linear.triton:csr_linear"},
    timed=timed(lambda inputs, outputs: {"number": inputs * outputs // 2}),
)
