"""What `bcsr_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.csr import random_positions
from effbench.kernels._common.shapes import size_cases
from effbench.kernels.bcsr_linear.reference import BcsrMatrix
from effbench.ops import Case, LinearOp, linear_case


def random_matrix(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> BcsrMatrix:
    """Fields of a case: block (its rows and columns), number of blocks; uneven, wide, see `random_positions`."""
    rows, columns = case["block"]
    crow, col = random_positions(case, case["out_features"] // rows, case["in_features"] // columns, on)
    return BcsrMatrix(crow, col, torch.randn(case["number"], rows, columns, **on).to(dtype))


NARROW = ((16, 16), (8, 4), (1, 8))
BLOCKS = (*NARROW[:2], (32, 32), NARROW[2])

OP = LinearOp(
    name="bcsr_linear",
    matrix=BcsrMatrix,
    random=random_matrix,
    cases=[
        *(
            linear_case(1, 128, 96, block=block, number=11, uneven=True)
            for block in ((16, 16), (8, 4), (32, 32), (1, 8))
        ),
        *(linear_case(17, 96, 64, block=block, number=5) for block in ((16, 16), (8, 4), (32, 32), (1, 8))),
        *(
            linear_case(3, 256, 128, block=block, number=24, uneven=True, wide=True)
            for block in ((16, 16), (8, 4), (1, 8))
        ),
        linear_case([2, 3], 64, 48, block=(16, 16), number=12),  # everything kept
        linear_case([2, 3], 45, 21, block=(7, 5), number=11, uneven=True),
        linear_case(1, 45, 21, block=(7, 5), number=11, uneven=True),
        linear_case(17, 36, 60, block=(20, 12), number=4),
    ],
    backends={"triton": "effbench.kernels.bcsr_linear.triton:bcsr_linear"},
    timed=size_cases(lambda inputs, outputs: {"block": (16, 16), "number": inputs * outputs // 512}),
)
