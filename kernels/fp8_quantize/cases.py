"""What `fp8_quantize` is called with, and how it is checked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effbench.kernels.fp8_quantize.reference import fp8_quantize
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Numbers of which a few saturate, and some infinities."""
    x = torch.randn(case["shape"], device=device, generator=generator)
    x.view(-1)[: case["infinite"]] = math.inf
    scale = torch.tensor(20000.0 if case["gradients"] else 200.0, device=device)
    counted = None if case.get("counted") is None else torch.arange(len(x), device=device) >= len(x) - case["counted"]
    return {"x": x.to(dtype), "scale": scale, "gradients": case["gradients"], "counted": counted}


class Rounding(Op):
    """An op whose codes are those of what float32 gives."""

    def widen(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(inputs)


def count_flops(x: Sequence[int], *_: Any, **__: Any) -> int:
    """A product, a clamp, a rounding, two comparisons for the largest and one to count, a number."""
    return 6 * math.prod(x)


OP = Rounding(
    name="fp8_quantize",
    reference=fp8_quantize,
    inputs=draw,
    flop_formula=count_flops,
    cases=[
        dict(shape=shape, infinite=infinite, gradients=gradients, counted=counted)
        for shape in ((7,), (17, 45), (2, 3, 64))
        for infinite in (0, 3)
        for gradients in (False, True)
        for counted in (None, 1)
    ],
    timed=[dict(shape=shape, infinite=0, gradients=False) for shape in ((64, 64), (8192, 4096), (14336, 4096))],
)
