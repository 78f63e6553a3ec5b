"""What `e8p_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.shapes import size_cases
from effbench.kernels.e8p_linear.reference import E8PMatrix
from effbench.ops import Case, LinearOp, linear_case

# Factors of the residual stage, by bits per weight in all: those of the code of QuIP#'s authors.
RESIDUAL_SCALE = {2: 1.0, 3: 2.04, 4: 3.45}


def random_matrix(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> E8PMatrix:
    """Fields of a case: bits (2, 3 or 4)."""
    shape = (case["out_features"], case["in_features"] // 8)
    residual = None
    if case["bits"] == 3:
        residual = torch.randint(256, shape, dtype=torch.uint8, **on)
    elif case["bits"] == 4:
        residual = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, **on)
    return E8PMatrix(
        weight=torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, **on),
        scale=torch.full((), 0.75, device=on["device"]),
        residual=residual,
        residual_scale=RESIDUAL_SCALE[case["bits"]],
    )


OP = LinearOp(
    name="e8p_linear",
    matrix=E8PMatrix,
    random=random_matrix,
    cases=[
        linear_case(batch, in_features, out_features, bits=bits)
        for bits in (2, 3, 4)
        for batch, in_features, out_features in (
            (1, 128, 33),
            (3, 104, 7),
            (17, 256, 40),
            ([2, 3], 8, 1),
        )
    ],
    backends={"triton": "effbench.kernels.e8p_linear.triton:e8p_linear"},
    timed=size_cases(lambda *_: {"bits": 2}),
)
