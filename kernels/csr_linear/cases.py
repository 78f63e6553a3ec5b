"""What `csr_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.csr import random_positions
from effbench.kernels._common.shapes import size_cases
from effbench.kernels.csr_linear.reference import CsrMatrix
from effbench.ops import Case, LinearOp, linear_case


def random_matrix(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> CsrMatrix:
    """Fields of a case: number of entries; uneven, wide, see `random_positions`."""
    crow, col = random_positions(case, case["out_features"], case["in_features"], on)
    return CsrMatrix(crow, col, torch.randn(case["number"], **on).to(dtype))


OP = LinearOp(
    name="csr_linear",
    matrix=CsrMatrix,
    random=random_matrix,
    cases=[
        linear_case(1, 128, 33, number=2112),
        linear_case(1, 300, 18, number=1800, uneven=True),
        linear_case(1, 77, 1, number=40, wide=True),
        linear_case(3, 45, 17, number=250, uneven=True),
        linear_case(3, 96, 40, number=3840),  # everything kept
        linear_case(17, 256, 65, number=5000, uneven=True, wide=True),
        linear_case(17, 40, 96, number=7),
        linear_case(40, 64, 9, number=200, wide=True),
        linear_case([2, 3], 45, 7, number=100, uneven=True),
    ],
    backends={"triton": "effbench.kernels.csr_linear.triton:csr_linear"},
    timed=size_cases(lambda inputs, outputs: {"number": inputs * outputs // 2}),
)
