"""What `clipped_policy` is called with, and how it is checked."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from effbench.kernels.clipped_policy.reference import clipped_policy, clipped_policy_gradient
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Tokens whose ratios lie on both sides of both bounds, with advantages of both signs."""
    number = case["tokens"]
    logits = 2 * torch.randn(number, case["vocabulary"], device=device, generator=generator)
    tokens = torch.randint(case["vocabulary"], (number,), device=device, generator=generator)
    logprob = (logits.to(dtype).float() / case["temperature"]).log_softmax(-1).gather(-1, tokens.unsqueeze(-1))[:, 0]
    return {
        "logits": logits.to(dtype),
        "tokens": tokens,
        "old": logprob + 0.3 * torch.randn(number, device=device, generator=generator),
        "advantage": torch.randn(number, device=device, generator=generator),
        "weight": 0.5 + 0.75 * torch.rand(number, device=device, generator=generator),
        "clip": 0.2,
        "temperature": case["temperature"],
    }


def count_flops(logits: Sequence[int], *_: Any, **__: Any) -> int:
    """A division by the temperature, and a softmax of five operations a number."""
    return 6 * math.prod(logits)


def count_gradient_flops(grad_out: Sequence[int], logits: Sequence[int], *_: Any, **__: Any) -> int:
    """The softmax again, and its product with the slope of the token."""
    return 6 * math.prod(logits)


OP = Op(
    name="clipped_policy",
    reference=clipped_policy,
    inputs=draw,
    cases=[
        dict(tokens=tokens, vocabulary=vocabulary, temperature=temperature)
        for tokens, vocabulary in ((1, 7), (40, 96), (16, 1000))
        for temperature in (1.0, 2.0, 0.5)
    ],
    differentiable=("logits",),
    gradient=clipped_policy_gradient,
    flop_formula=count_flops,
    gradient_flop_formula=count_gradient_flops,
    timed=[
        dict(tokens=tokens, vocabulary=vocabulary, temperature=1.0)
        for tokens, vocabulary in ((64, 1536), (64, 49152), (4096, 128256))
    ],
)
