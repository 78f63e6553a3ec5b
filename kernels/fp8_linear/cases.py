"""What `fp8_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.dense import activations, adjoint, scales
from effbench.kernels._common.shapes import timed
from effbench.kernels.fp8_linear.reference import dense, fp8_linear
from effbench.ops import Case, Op, Peer


def inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Fields of a case: batch, in_features, out_features, activations; per_tensor (scale, default False)."""
    shape = (case["out_features"], case["in_features"])
    on: dict[str, Any] = {"device": device, "generator": generator}
    return {
        "x": activations(case, device, dtype, generator),
        "weight": (50 * torch.randn(shape, **on)).clamp(-448, 448).to(torch.float8_e4m3fn),
        "scale": scales(1 if case.get("per_tensor") else shape[0], 1, **on) / 50,
        "activations": case["activations"],
    }


def _case(batch: int | list[int], in_features: int, out_features: int, activations: str, **more: bool) -> Case:
    return dict(batch=batch, in_features=in_features, out_features=out_features, activations=activations, **more)


OP = Op(
    name="fp8_linear",
    reference=fp8_linear,
    adjoint=adjoint(dense),
    out_features=lambda x, weight, *_: weight.shape[0],
    inputs=inputs,
    cases=[
        *(_case(1, 128, 33, activations) for activations in ("none", "token", "tensor")),
        *(_case(3, 45, 17, activations, per_tensor=True) for activations in ("none", "token", "tensor")),
        *(_case(17, 256, 64, activations) for activations in ("none", "token", "tensor")),
        _case([2, 3], 77, 1, "token"),
        _case(17, 96, 40, "none"),
        _case(32, 64, 48, "token"),
    ],
    backends={
        "scaled_mm": "effbench.kernels.fp8_linear.scaled_mm:fp8_linear",
        "triton": "effbench.kernels.fp8_linear.triton:fp8_linear",
    },
    timed=[
        *timed(lambda *_: {"activations": "none"}, batches=(1,)),
        *timed(lambda *_: {"activations": "token"}, batches=(16, 64)),
    ],
    peers={
        "torch._scaled_mm": Peer("effbench.kernels.fp8_linear.peers:scaled_mm", "torch", note="output rounded once"),
    },
)
