"""What `unscale` is called with, and how it is checked."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from effbench.kernels.unscale.reference import unscale
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Gradients of a few tensors, the last of which may have overflowed."""
    gradients = [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in case["shapes"]]
    if case["overflows"]:
        gradients[-1].view(-1)[-1] = math.inf
    return {"gradients": gradients, "inverse": 1 / 1024}


def count_flops(gradients: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """A product and a comparison a number."""
    return 2 * sum(map(math.prod, gradients))


OP = Op(
    name="unscale",
    reference=unscale,
    inputs=draw,
    fake=lambda gradients, inverse: gradients[0].new_empty((), dtype=torch.bool),
    mutates=("gradients",),
    flop_formula=count_flops,
    cases=[
        dict(shapes=shapes, overflows=overflows)
        for shapes in (((7,),), ((17, 45), (3,)), ((2, 3, 64), (5, 5), (1,)))
        for overflows in (False, True)
    ],
    timed=[dict(shapes=((64, 64),) * 8, overflows=False), dict(shapes=((14336, 4096),) * 4, overflows=False)],
)
