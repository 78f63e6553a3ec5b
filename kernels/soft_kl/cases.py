"""What `soft_kl` is called with, and how it is checked."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from effbench.kernels.soft_kl.reference import soft_kl, soft_kl_gradient
from effbench.ops import TOLERANCE, Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Logits of a confident teacher and of a student that half agrees."""
    shape = case["tokens"], case["vocabulary"]
    teacher = 4 * torch.randn(shape, device=device, generator=generator)
    student = 0.5 * teacher + torch.randn(shape, device=device, generator=generator)
    return {"student": student.to(dtype), "teacher": teacher.to(dtype), "temperature": case["temperature"]}


def count_flops(student: Sequence[int], teacher: Sequence[int], temperature: float, out_shape: Sequence[int]) -> int:
    """Two softmaxes of five operations a number, and three for the divergence."""
    return 13 * math.prod(student)


def count_gradient_flops(grad_out: Sequence[int], student: Sequence[int], *_: Any, **__: Any) -> int:
    """Two softmaxes again, and three operations a number on their difference."""
    return 13 * math.prod(student)


OP = Op(
    name="soft_kl",
    reference=soft_kl,
    inputs=draw,
    cases=[
        dict(tokens=tokens, vocabulary=vocabulary, temperature=temperature)
        for tokens, vocabulary in ((1, 7), (5, 96), (3, 1000))
        for temperature in (1.0, 2.0, 0.5)
    ],
    # Two distributions that nearly agree: what is left of their logarithms has fewer digits than these.
    tolerance={**TOLERANCE, "float32": 1e-4},
    differentiable=("student",),
    gradient=soft_kl_gradient,
    flop_formula=count_flops,
    gradient_flop_formula=count_gradient_flops,
    timed=[
        dict(tokens=tokens, vocabulary=vocabulary, temperature=2.0)
        for tokens, vocabulary in ((64, 1536), (64, 49152), (4096, 128256))
    ],
)
