"""What `fake_quantize` is called with, and how it is checked."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from effbench.kernels.fake_quantize.reference import fake_quantize, fake_quantize_gradient
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Groups whose numbers reach half beyond the ends of their grids."""
    bits, shape = case["bits"], (case["groups"], 1)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if case["signed"] else (0, 2**bits - 1)
    zero = torch.randint(low, high + 1, shape, device=device, generator=generator).float()
    scale = 0.01 + torch.rand(shape, device=device, generator=generator)
    within = torch.rand(case["groups"], case["size"], device=device, generator=generator)
    codes = low + (1.5 * within - 0.25) * (high - low)
    real = ((codes - zero) * scale).to(dtype)
    return {"real": real, "scale": scale, "zero": zero, "low": low, "high": high}


def count_flops(real: Sequence[int], *_: Any, **__: Any) -> int:
    """A quotient, a rounding, two sums, two comparisons and a product a number."""
    return 7 * math.prod(real)


def count_gradient_flops(grad_out: Sequence[int], *_: Any, **__: Any) -> int:
    """The code again, two comparisons, their product and that with the gradient a number."""
    return 7 * math.prod(grad_out)


OP = Op(
    name="fake_quantize",
    reference=fake_quantize,
    inputs=draw,
    cases=[
        dict(groups=groups, size=size, bits=bits, signed=signed)
        for groups, size in ((1, 32), (7, 5), (16, 128))
        for bits, signed in ((2, False), (4, True), (8, True))
    ],
    differentiable=("real",),
    gradient=fake_quantize_gradient,
    flop_formula=count_flops,
    gradient_flop_formula=count_gradient_flops,
    timed=[dict(groups=groups, size=128, bits=4, signed=False) for groups in (64, 2**17)],
)
