"""What `lut_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.packing import word_count
from effbench.kernels._common.random import random_scales, random_words
from effbench.kernels._common.shapes import size_cases
from effbench.kernels.lut_linear.reference import LutMatrix
from effbench.ops import Case, LinearOp, Peer, linear_case


def random_matrix(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> LutMatrix:
    """Fields of a case: bits; block, per_row, outliers a row (or 0)."""
    columns, rows, bits = case["in_features"], case["out_features"], case["bits"]
    block, outliers = case.get("block", 0), case.get("outliers", 0)
    levels = torch.randn(*([rows] if case.get("per_row") else []), 2**bits, **on)
    matrix = LutMatrix(
        weight=random_words(rows, word_count(columns, bits), **on),
        lut=levels.half() if case.get("per_row") else levels,
        absmax=random_scales(-(-rows * columns // block), **on) if block else None,
        bits=bits,
        block=block,
    )
    if not outliers:
        return matrix
    # Twice as many in every second row and none in the others: kernels must not assume equal rows.
    row = torch.arange(rows + 1, dtype=torch.int32, device=levels.device)
    column = torch.rand(rows // 2, columns, **on).argsort(1)[:, : 2 * outliers].sort(1).values
    return matrix._replace(
        crow=row // 2 * 2 * outliers,
        col=column.flatten().to(torch.int16),
        values=torch.randn(rows // 2 * 2 * outliers, **on).half(),
    )


OP = LinearOp(
    name="lut_linear",
    matrix=LutMatrix,
    random=random_matrix,
    cases=[
        *(linear_case(1, 128, 33, bits=bits, block=64) for bits in (2, 3, 4)),
        *(linear_case(3, 96, 18, bits=bits, per_row=1, outliers=2) for bits in (2, 3, 4)),
        linear_case(17, 256, 65, bits=4, block=64),
        linear_case(17, 96, 7, bits=4, block=64),  # blocks straddle rows
        linear_case(3, 45, 7, bits=3, block=64),
        linear_case([2, 3], 45, 6, bits=4, per_row=1, outliers=1),
        linear_case(1, 77, 1, bits=4),
        linear_case(17, 96, 40, bits=3, per_row=1),
    ],
    backends={"triton": "effbench.kernels.lut_linear.triton:lut_linear"},
    timed=size_cases(lambda *_: {"bits": 4, "block": 64}),
    peers={
        "bitsandbytes": Peer("effbench.kernels.lut_linear.peers:bitsandbytes", "bitsandbytes", note="table in 16 bits")
    },
)
