"""What `e8p_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.dense import activations, adjoint
from effbench.kernels._common.shapes import timed
from effbench.kernels.e8p_linear.reference import dense, e8p_linear
from effbench.ops import Case, Op

# Factors of the residual stage, by bits per weight in all: the authors' (QuIP#, appendix on RVQ).
RESIDUAL_SCALE = {2: 1.0, 3: 2.04, 4: 3.45}


def inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Fields of a case: batch, in_features, out_features, bits (2, 3 or 4)."""
    shape = (case["out_features"], case["in_features"] // 8)
    on: dict[str, Any] = {"device": device, "generator": generator}
    residual = None
    if case["bits"] == 3:
        residual = torch.randint(256, shape, dtype=torch.uint8, **on)
    elif case["bits"] == 4:
        residual = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, **on)
    return {
        "x": activations(case, device, dtype, generator),
        "weight": torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, **on),
        "scale": torch.full((), 0.75, device=device),
        "residual": residual,
        "residual_scale": RESIDUAL_SCALE[case["bits"]],
    }


OP = Op(
    name="e8p_linear",
    reference=e8p_linear,
    adjoint=adjoint(dense),
    out_features=lambda x, weight, *_: weight.shape[0],
    inputs=inputs,
    cases=[
        dict(batch=batch, in_features=in_features, out_features=out_features, bits=bits)
        for bits in (2, 3, 4)
        for batch, in_features, out_features in (
            (1, 128, 33),
            (3, 104, 7),
            (17, 256, 40),
            ([2, 3], 8, 1),
        )
    ],
    backends={"triton": "effbench.kernels.e8p_linear.triton:e8p_linear"},
    timed=timed(lambda *_: {"bits": 2}),
)
