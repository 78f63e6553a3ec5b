"""What `lut_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.dense import activations, adjoint, scales, words
from effbench.kernels._common.packing import word_count
from effbench.kernels._common.shapes import timed
from effbench.kernels.lut_linear.reference import dense, lut_linear
from effbench.ops import Case, Op, Peer


def inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Fields of a case: batch, in_features, out_features, bits; block, per_row, outliers a row (or 0)."""
    columns, rows, bits = case["in_features"], case["out_features"], case["bits"]
    block, outliers = case.get("block", 0), case.get("outliers", 0)
    on: dict[str, Any] = {"device": device, "generator": generator}
    levels = torch.randn(*([rows] if case.get("per_row") else []), 2**bits, **on)
    arguments = {
        "x": activations(case, device, dtype, generator),
        "weight": words(rows, word_count(columns, bits), **on),
        "lut": levels.half() if case.get("per_row") else levels,
        "absmax": scales(-(-rows * columns // block), **on) if block else None,
        "crow": None,
        "col": None,
        "values": None,
        "bits": bits,
        "block": block,
    }
    if outliers:
        # Twice as many in every second row and none in the others: kernels must not assume equal rows.
        row = torch.arange(rows + 1, dtype=torch.int32, device=device)
        number = rows // 2 * 2 * outliers
        column = torch.rand(rows // 2, columns, **on).argsort(1)[:, : 2 * outliers].sort(1).values
        arguments |= {
            "crow": row // 2 * 2 * outliers,
            "col": column.flatten().to(torch.int16),
            "values": torch.randn(number, **on).half(),
        }
    return arguments


def _case(batch: int | list[int], in_features: int, out_features: int, bits: int, **more: int) -> Case:
    return dict(batch=batch, in_features=in_features, out_features=out_features, bits=bits, **more)


OP = Op(
    name="lut_linear",
    reference=lut_linear,
    adjoint=adjoint(dense),
    out_features=lambda x, weight, *_: weight.shape[0],
    inputs=inputs,
    cases=[
        *(_case(1, 128, 33, bits, block=64) for bits in (2, 3, 4)),
        *(_case(3, 96, 18, bits, per_row=1, outliers=2) for bits in (2, 3, 4)),
        _case(17, 256, 65, 4, block=64),
        _case(17, 96, 7, 4, block=64),  # blocks straddle rows
        _case(3, 45, 7, 3, block=64),
        _case([2, 3], 45, 6, 4, per_row=1, outliers=1),
        _case(1, 77, 1, 4),
        _case(17, 96, 40, 3, per_row=1),
    ],
    backends={"triton": "effbench.kernels.lut_linear.triton:lut_linear"},
    timed=timed(lambda *_: {"bits": 4, "block": 64}),
    peers={
        "bitsandbytes": Peer("effbench.kernels.lut_linear.peers:bitsandbytes", "bitsandbytes", note="table in 16 bits")
    },
)
