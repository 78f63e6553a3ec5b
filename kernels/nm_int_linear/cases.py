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
    """Fields of a case: n, m, and those of `random_grid`."""
    out, width, n, m, bits = case["out_features"], case["in_features"], case["n"], case["m"], case["bits"]
    codes = random_words(out, word_count(width // m * n, bits), **on)
    return NmIntMatrix(codes, random_index(out, width, n, m, **on), **random_grid(case, on), n=n, m=m)


OP = LinearOp(
    name="nm_int_linear",
    matrix=NmIntMatrix,
    random=random_matrix,
    cases=[
        *(linear_case(1, 128, 33, n=2, m=4, bits=bits, group_size=32, zero=True) for bits in (2, 3, 4, 8)),
        linear_case(3, 96, 17, n=4, m=8, bits=4),
        linear_case(17, 256, 65, n=2, m=4, bits=4, group_size=128, zero=True),
        linear_case(3, 128, 33, n=2, m=4, bits=4, group_size=32, zero=True, g_idx=True),
        linear_case([2, 3], 45, 7, n=1, m=3, bits=3, zero=True),
        linear_case(17, 64, 5, n=2, m=4, bits=8, per_tensor=True),
        linear_case(1, 576, 33, n=2, m=4, bits=4, group_size=128, zero=True),  # the last group is shorter
        linear_case(17, 320, 24, n=4, m=8, bits=4, group_size=128),
        linear_case(3, 100, 9, n=2, m=4, bits=3, group_size=64, zero=True),
    ],
    backends={"triton": "effbench.kernels.nm_int_linear.triton:nm_int_linear"},
    timed=size_cases(lambda *_: {"n": 2, "m": 4, "bits": 4, "group_size": 128, "zero": True}),
)
