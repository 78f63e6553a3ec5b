"""What `nm_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.nm import random_index
from effbench.kernels._common.shapes import size_cases
from effbench.kernels.nm_linear.reference import NmMatrix
from effbench.ops import Case, LinearOp, linear_case


def random_matrix(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> NmMatrix:
    """Fields of a case: n, m."""
    out, width, n, m = case["out_features"], case["in_features"], case["n"], case["m"]
    values = torch.randn(out, width // m * n, **on).to(dtype)
    return NmMatrix(values, random_index(out, width, n, m, **on), n, m)


OP = LinearOp(
    name="nm_linear",
    matrix=NmMatrix,
    random=random_matrix,
    cases=[
        linear_case(1, 128, 33, n=2, m=4),
        linear_case(17, 256, 65, n=2, m=4),
        linear_case(3, 96, 17, n=4, m=8),
        linear_case(1, 48, 7, n=1, m=4),
        linear_case([2, 3], 45, 7, n=1, m=3),
        linear_case(17, 160, 40, n=5, m=16),
        linear_case([2, 9], 128, 64, n=2, m=4),
    ],
    backends={
        "cusparselt": "effbench.kernels.nm_linear.cusparselt:nm_linear",
        "triton": "effbench.kernels.nm_linear.triton:nm_linear",
    },
    timed=size_cases(lambda *_: {"n": 2, "m": 4}),
)
