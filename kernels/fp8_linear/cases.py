"""What `fp8_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.random import random_scales
from effbench.kernels._common.shapes import size_cases
from effbench.kernels.fp8_linear.reference import Fp8Matrix, fp8_linear
from effbench.ops import Case, LinearOp, Peer, linear_case


def random_matrix(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> Fp8Matrix:
    """Fields of a case: activations; per_tensor (scale, default False)."""
    shape = (case["out_features"], case["in_features"])
    return Fp8Matrix(
        weight=(50 * torch.randn(shape, **on)).clamp(-448, 448).to(torch.float8_e4m3fn),
        scale=random_scales(1 if case.get("per_tensor") else shape[0], 1, **on) / 50,
        activations=case["activations"],
    )


ACTIVATIONS = ("none", "token", "tensor")

OP = LinearOp(
    name="fp8_linear",
    matrix=Fp8Matrix,
    random=random_matrix,
    product=fp8_linear,
    unrounded={"activations": "none"},
    cases=[
        *(linear_case(1, 128, 33, activations=activations) for activations in ACTIVATIONS),
        *(linear_case(3, 45, 17, activations=activations, per_tensor=True) for activations in ACTIVATIONS),
        *(linear_case(17, 256, 64, activations=activations) for activations in ACTIVATIONS),
        linear_case([2, 3], 77, 1, activations="token"),
        linear_case(17, 96, 40, activations="none"),
        linear_case(32, 64, 48, activations="token"),
    ],
    backends={
        "scaled_mm": "effbench.kernels.fp8_linear.scaled_mm:fp8_linear",
        "triton": "effbench.kernels.fp8_linear.triton:fp8_linear",
    },
    timed=[
        *size_cases(lambda *_: {"activations": "none"}, batches=(1,)),
        *size_cases(lambda *_: {"activations": "token"}, batches=(16, 64)),
    ],
    peers={
        "torch._scaled_mm": Peer("effbench.kernels.fp8_linear.peers:scaled_mm", "torch", note="output rounded once"),
    },
)
