"""What `kv_quantize` is called with, and how it is checked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effbench.kernels.kv_quantize.reference import kv_quantize
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Numbers of unlike ranges."""
    x = torch.randn(case["groups"], case["size"], device=device, generator=generator)
    spread = torch.logspace(-2, 2, case["groups"], device=device)[:, None]
    return {"x": (x * spread).to(dtype), "bits": case["bits"], "symmetric": case["symmetric"]}


class Rounding(Op):
    """An op whose numbers are those of the type that it stores scales in, with codes that fit to them."""

    def widen(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(inputs)


def count_flops(x: Sequence[int], bits: int, symmetric: bool = False, *, out_shape: Any) -> int:
    """Two comparisons for the range, a difference, a quotient and a rounding a number."""
    return 5 * math.prod(x)


OP = Rounding(
    name="kv_quantize",
    reference=kv_quantize,
    inputs=draw,
    flop_formula=count_flops,
    cases=[
        dict(groups=groups, size=size, bits=bits, symmetric=symmetric)
        for groups, size in ((1, 32), (7, 5), (16, 64))
        for bits in (2, 4, 8)
        for symmetric in (False, True)
    ],
    timed=[dict(groups=groups, size=32, bits=bits, symmetric=False) for groups in (64, 2**20) for bits in (2, 4, 8)],
)
