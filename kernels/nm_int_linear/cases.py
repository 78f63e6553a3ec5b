"""What `nm_int_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.nm import random_index
from effbench.kernels._common.packing import word_count
from effbench.kernels._common.random import random_grid, random_words
from effbench.kernels._common.shapes import size_cases
from effbench.kernels.nm_int_linear.reference import NmIntMatrix
from effbench.ops import Case, LinearOp, linear_case


def random_matrix(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> NmIntMatrix:
    """Fields of a case: n, m, bits, and those of `random_grid`."""
    out, width, n, m, bits = case["out_features"], case["in_features"], case["n"], case["m"], case["bits"]
    codes = random_words(out, word_count(width // m * n, bits), **on)
    return NmIntMatrix(codes, random_index(out, width, n, m, **on), **random_grid(case, on), bits=bits, n=n, m=m)


OP = LinearOp(
    name="nm_int_linear",
    matrix=NmIntMatrix,
    random=random_matrix,
    cases=[
        *(linear_case(1, 128, 33, n=2, m=4, bits=bits, groups=4, zero=True) for bits in (2, 3, 4, 8)),
        linear_case(3, 96, 17, n=4, m=8, bits=4, groups=1),
        linear_case(17, 256, 65, n=2, m=4, bits=4, groups=2, zero=True),
        linear_case(3, 128, 33, n=2, m=4, bits=4, groups=4, zero=True, g_idx=True),
        linear_case([2, 3], 45, 7, n=1, m=3, bits=3, groups=1, zero=True),
        linear_case(17, 64, 5, n=2, m=4, bits=8, groups=1, per_tensor=True),
    ],
    backends={"triton": "effbench.kernels.nm_int_linear.triton:nm_int_linear"},
    timed=size_cases(lambda inputs, _: {"n": 2, "m": 4, "bits": 4, "groups": inputs // 128, "zero": True}),
)
