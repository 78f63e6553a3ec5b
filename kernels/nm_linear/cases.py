"""What `nm_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.dense import activations, adjoint
from effbench.kernels._common.nm import random_index
from effbench.kernels._common.shapes import timed
from effbench.kernels.nm_linear.reference import dense, nm_linear
from effbench.ops import Case, Op


def inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Fields of a case: batch, in_features, out_features, n, m."""
    out, width, n, m = case["out_features"], case["in_features"], case["n"], case["m"]
    values = torch.randn(out, width // m * n, device=device, generator=generator)
    return {
        "x": activations(case, device, dtype, generator),
        "values": values.to(dtype),
        "index": random_index(out, width, n, m, device, generator),
        "n": n,
        "m": m,
    }


def _case(batch: int | list[int], in_features: int, out_features: int, n: int, m: int) -> Case:
    return dict(batch=batch, in_features=in_features, out_features=out_features, n=n, m=m)


OP = Op(
    name="nm_linear",
    reference=nm_linear,
    adjoint=adjoint(dense),
    out_features=lambda x, values, *_: values.shape[0],
    inputs=inputs,
    cases=[
        _case(1, 128, 33, 2, 4),
        _case(17, 256, 65, 2, 4),
        _case(3, 96, 17, 4, 8),
        _case(1, 48, 7, 1, 4),
        _case([2, 3], 45, 7, 1, 3),
        _case(17, 160, 40, 5, 16),
        _case([2, 9], 128, 64, 2, 4),
    ],
    backends={
        "cusparselt": "effbench.kernels.nm_linear.cusparselt:nm_linear",
        "triton": "effbench.kernels.nm_linear.triton:nm_linear",
    },
    timed=timed(lambda *_: {"n": 2, "m": 4}),
)
