"""What `hadamard` is called with, and how it is checked."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effbench.kernels._common.dense import activations
from effbench.kernels.hadamard.matrices import factors
from effbench.kernels.hadamard.reference import hadamard
from effbench.ops import Case, Op


def inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Fields of a case: batch, in_features; transpose (default False)."""
    x = activations(case, device, dtype, generator)
    return {"x": x, "transpose": case.get("transpose", False)}


def _adjoint(grad: Tensor, in_features: int, transpose: bool) -> Tensor:
    return hadamard(grad, not transpose)


def _flops(x: Sequence[int], out: Sequence[int]) -> int:
    """Additions of the fast transform: log2 of the power-of-two part, and m for the rest, per number."""
    power, m = factors(x[-1])
    return math.prod(x) * (power.bit_length() - 1 + (2 * m if m > 1 else 0))


OP = Op(
    name="hadamard",
    reference=hadamard,
    adjoint=_adjoint,
    out_features=lambda x, *_: x.shape[-1],
    inputs=inputs,
    cases=[
        *(dict(batch=1, in_features=n) for n in (1, 2, 64, 128, 256, 384)),
        *(dict(batch=3, in_features=n, transpose=True) for n in (12, 56, 128, 344)),
        *(dict(batch=17, in_features=n) for n in (16, 40, 768)),
        dict(batch=[2, 3], in_features=512),
    ],
    shape_flops=_flops,
    backends={"triton": "effbench.kernels.hadamard.triton:hadamard"},
    timed=[dict(batch=batch, in_features=n) for n in (1024, 4096, 14336) for batch in (1, 16)],
)
