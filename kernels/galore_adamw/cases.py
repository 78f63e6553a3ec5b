"""What `galore_adamw` is called with, and how it is checked."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from effbench.kernels.galore_adamw.reference import galore_adamw
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """A parameter, its gradient, bases of about orthonormal columns and moments."""
    on: dict[str, Any] = {"device": device, "generator": generator}
    shape, rank, sides = list(case["shape"]), case["rank"], case["sides"]
    left = torch.randn(shape[0], rank, **on) / math.sqrt(shape[0]) if "left" in sides else None
    right = torch.randn(rank, shape[1], **on) / math.sqrt(shape[1]) if "right" in sides else None
    low = [rank if side in sides else size for side, size in zip(("left", "right"), shape, strict=True)]
    return {
        "parameter": torch.randn(shape, **on).to(dtype),
        "gradient": torch.randn(shape, **on).to(dtype),
        "left": left,
        "right": right,
        "m": torch.randn(low, **on),
        "v": torch.rand(low, **on),
        "step": case["step"],
        **{"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.1, "scale": 0.25},
        "decay_first": case["decay_first"],
    }


def count_flops(
    parameter: Sequence[int],
    gradient: Sequence[int],
    left: Sequence[int] | None,
    right: Sequence[int] | None,
    m: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Each product with a basis there and back, fourteen operations a number of the moments, five of the parameter."""
    size = math.prod(parameter)
    flops = 14 * math.prod(m) + 5 * size
    if left is not None:
        flops += 4 * size * left[1]
        size = left[1] * parameter[1]
    return flops + (4 * size * right[0] if right is not None else 0)


OP = Op(
    name="galore_adamw",
    reference=galore_adamw,
    inputs=draw,
    fake=lambda *_, **__: None,
    mutates=("parameter", "m", "v"),
    flop_formula=count_flops,
    cases=[
        dict(shape=shape, rank=rank, sides=sides, step=step, decay_first=step > 1)
        for shape, rank, sides in (
            ((24, 16), 4, ("right",)),
            ((16, 24), 4, ("left",)),
            ((16, 16), 16, ("right",)),
            ((24, 16), 3, ("left", "right")),
            ((5, 7), 1, ()),
        )
        for step in (1, 100)
    ],
    timed=[
        dict(shape=shape, rank=128, sides=("right",), step=100, decay_first=False)
        for shape in ((384, 576), (1536, 576), (14336, 4096))
    ],
)
