"""What `generalized_jsd` is called with, and how it is checked."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from effbench.kernels.generalized_jsd.reference import generalized_jsd, generalized_jsd_gradient
from effbench.ops import TOLERANCE, Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Logits of a confident teacher and of a student that half agrees."""
    shape = case["tokens"], case["vocabulary"]
    teacher = 4 * torch.randn(shape, device=device, generator=generator)
    student = 0.5 * teacher + torch.randn(shape, device=device, generator=generator)
    settings = {name: case[name] for name in ("beta", "temperature")}
    return {"student": student.to(dtype), "teacher": teacher.to(dtype), **settings}


def count_flops(student: Sequence[int], *_: Any, **__: Any) -> int:
    """Two softmaxes of five operations a number, four for the mixture and six for the divergences."""
    return 20 * math.prod(student)


def count_gradient_flops(grad_out: Sequence[int], student: Sequence[int], *_: Any, **__: Any) -> int:
    """Two softmaxes and the mixture again, and six operations a number on them."""
    return 20 * math.prod(student)


OP = Op(
    name="generalized_jsd",
    reference=generalized_jsd,
    inputs=draw,
    cases=[
        dict(tokens=tokens, vocabulary=vocabulary, beta=beta, temperature=temperature)
        for tokens, vocabulary, temperature in ((1, 7, 1.0), (5, 96, 2.0), (3, 1000, 0.5))
        for beta in (0.0, 0.1, 0.5, 1.0)
    ],
    # Distributions that nearly agree: what is left of their logarithms has fewer digits than these.
    tolerance={**TOLERANCE, "float32": 1e-4},
    differentiable=("student",),
    gradient=generalized_jsd_gradient,
    flop_formula=count_flops,
    gradient_flop_formula=count_gradient_flops,
    timed=[
        dict(tokens=tokens, vocabulary=vocabulary, beta=0.5, temperature=1.0)
        for tokens, vocabulary in ((64, 1536), (64, 49152), (4096, 128256))
    ],
)
