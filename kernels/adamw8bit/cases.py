"""What `adamw8bit` is called with, and how it is checked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effbench.kernels._common.random import random_scales
from effbench.kernels.adamw8bit.reference import BLOCK, adamw8bit
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """A parameter, its gradient, and moments of any codes."""
    on: dict[str, Any] = {"device": device, "generator": generator}
    shape = case["shape"]
    moments: dict[str, Any] = {}
    for name, size in (("m", 1.0), ("v", 0.1)):
        moments[name] = torch.randint(256, shape, dtype=torch.uint8, **on)
        moments[f"{name}_absmax"] = size * random_scales(-(-math.prod(shape) // BLOCK), **on)
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": case["weight_decay"]}
    parameter, gradient = (torch.randn(shape, **on).to(dtype) for _ in range(2))
    return {"parameter": parameter, "gradient": gradient, **moments, "step": case["step"], **settings}


class Rounding(Op):
    """An op whose codes are those of what float32 gives."""

    def widen(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(inputs)


def count_flops(parameter: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products to decode, seven for the moments, eight for the update, and twice nine to find levels."""
    return 35 * math.prod(parameter)


OP = Rounding(
    name="adamw8bit",
    reference=adamw8bit,
    inputs=draw,
    fake=lambda *_, **__: None,
    mutates=("parameter", "m", "m_absmax", "v", "v_absmax"),
    flop_formula=count_flops,
    cases=[
        dict(shape=shape, step=step, weight_decay=weight_decay)
        for shape in ((7,), (17, 241), (2, 3, 64))
        for step, weight_decay in ((1, 0.0), (100, 0.1))
    ],
    timed=[dict(shape=shape, step=100, weight_decay=0.0) for shape in ((64, 64), (1536, 576), (14336, 4096))],
)
