"""What `bitmask_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.csr import random_entries, row_starts
from effbench.kernels._common.packing import pack
from effbench.kernels._common.shapes import size_cases
from effbench.kernels.bitmask_linear.reference import BitmaskMatrix
from effbench.ops import Case, LinearOp, linear_case


def random_matrix(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> BitmaskMatrix:
    """Fields of a case: number of entries; uneven, see `random_entries`."""
    rows, columns = case["out_features"], case["in_features"]
    entries = random_entries(case, rows, columns, on)
    keep = torch.zeros(rows * columns, dtype=torch.int32, device=entries.device).scatter_(0, entries, 1)
    bits = pack(keep.view(rows, columns), 1)
    return BitmaskMatrix(row_starts(entries, rows, columns), bits, torch.randn(case["number"], **on).to(dtype))


OP = LinearOp(
    name="bitmask_linear",
    matrix=BitmaskMatrix,
    random=random_matrix,
    cases=[
        linear_case(1, 128, 33, number=2112),
        linear_case(1, 300, 18, number=1800, uneven=True),
        linear_case(1, 77, 1, number=40),
        linear_case(3, 45, 17, number=250, uneven=True),
        linear_case(3, 96, 40, number=3840),  # everything kept
        linear_case(17, 576, 65, number=9000, uneven=True),
        linear_case(17, 40, 96, number=7),
        linear_case(40, 64, 9, number=200),
        linear_case([2, 3], 45, 7, number=100, uneven=True),
    ],
    backends={"triton": "effbench.kernels.bitmask_linear.triton:bitmask_linear"},
    timed=size_cases(lambda inputs, outputs: {"number": inputs * outputs // 2}),
)
