"""What `bcsr_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.dense import activations, adjoint
from effbench.kernels._common.shapes import timed
from effbench.kernels.bcsr_linear.reference import bcsr_linear, dense
from effbench.kernels.csr_linear.cases import scattered
from effbench.ops import Case, Op


def inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Fields of a case: batch, in_features, out_features, block (its rows and columns), number of blocks; uneven,
    wide (int32 columns)."""
    rows, columns = case["block"]
    block_rows, block_columns = case["out_features"] // rows, case["in_features"] // columns
    crow, col = scattered(case, block_rows, block_columns, device, generator)
    return {
        "x": activations(case, device, dtype, generator),
        "crow": crow,
        "col": col,
        "values": torch.randn(case["number"], rows, columns, device=device, generator=generator).to(dtype),
    }


def _case(
    batch: int | list[int], in_features: int, out_features: int, block: tuple[int, int], number: int, **more: bool
) -> Case:
    return dict(batch=batch, in_features=in_features, out_features=out_features, block=block, number=number, **more)


OP = Op(
    name="bcsr_linear",
    reference=bcsr_linear,
    adjoint=adjoint(dense),
    out_features=lambda x, crow, col, values: (crow.shape[0] - 1) * values.shape[1],
    inputs=inputs,
    cases=[
        *(_case(1, 128, 96, block, 11, uneven=True) for block in ((16, 16), (8, 4), (32, 32), (1, 8))),
        *(_case(17, 96, 64, block, 5) for block in ((16, 16), (8, 4), (32, 32), (1, 8))),
        *(_case(3, 256, 128, block, 24, uneven=True, wide=True) for block in ((16, 16), (8, 4), (1, 8))),
        _case([2, 3], 64, 48, (16, 16), 12),  # everything kept
        _case([2, 3], 45, 21, (7, 5), 11, uneven=True),
        _case(1, 45, 21, (7, 5), 11, uneven=True),
        _case(17, 36, 60, (20, 12), 4),
    ],
    backends={"triton": "effbench.kernels.bcsr_linear.triton:bcsr_linear"},
    timed=timed(lambda inputs, outputs: {"block": (16, 16), "number": inputs * outputs // 512}),
)
