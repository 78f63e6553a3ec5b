"""What `facility_gain` is called with, and how it is checked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from effbench.kernels.facility_gain.reference import facility_gain
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Random directions, the candidates among the points, and points that are covered more or less."""
    points = normalize(torch.randn(case["points"], case["width"], device=device, generator=generator), dim=1)
    covered = torch.rand(case["points"], device=device, generator=generator)
    rows = points.to(dtype)
    return {"candidates": rows[: case["candidates"]].clone(), "points": rows, "covered": covered, "low": case["low"]}


def count_flops(
    candidates: Sequence[int], points: Sequence[int], covered: Sequence[int], low: float, out_shape: Sequence[int]
) -> int:
    """Products of all candidates with all points, and five operations on each."""
    return candidates[0] * points[0] * (2 * points[1] + 5)


OP = Op(
    name="facility_gain",
    reference=facility_gain,
    inputs=draw,
    cases=[
        dict(candidates=candidates, points=points, width=width, low=low)
        for candidates, points, width in ((1, 1, 3), (4, 37, 16), (33, 300, 64))
        for low in (-1.0, 0.0, 0.3)
    ],
    flop_formula=count_flops,
    timed=[
        dict(candidates=candidates, points=points, width=384, low=-0.2)
        for candidates, points in ((64, 2000), (4096, 4096), (4096, 65536))
    ],
)
