"""What `nm_int_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.dense import activations, adjoint, scales, words
from effbench.kernels._common.nm import random_index
from effbench.kernels._common.packing import word_count
from effbench.kernels._common.shapes import timed
from effbench.kernels.nm_int_linear.reference import dense, nm_int_linear
from effbench.ops import Case, Op


def inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Fields of a case: batch, in_features, out_features, n, m, bits, groups; per_tensor, zero, g_idx (or False)."""
    out, width, n, m = case["out_features"], case["in_features"], case["n"], case["m"]
    groups, bits = case["groups"], case["bits"]
    rows = 1 if case.get("per_tensor") else out
    on: dict[str, Any] = {"device": device, "generator": generator}
    return {
        "x": activations(case, device, dtype, generator),
        "weight": words(out, word_count(width // m * n, bits), **on),
        "index": random_index(out, width, n, m, device, generator),
        "scale": scales(rows, groups, **on).half(),
        "zero": words(word_count(rows, bits), groups, **on) if case.get("zero") else None,
        "g_idx": (torch.randperm(width, **on) % groups).to(torch.int32) if case.get("g_idx") else None,
        "bits": bits,
        "n": n,
        "m": m,
    }


def _case(
    batch: int | list[int], in_features: int, out_features: int, n: int, m: int, bits: int, groups: int, **more: bool
) -> Case:
    return dict(
        batch=batch, in_features=in_features, out_features=out_features, n=n, m=m, bits=bits, groups=groups, **more
    )


OP = Op(
    name="nm_int_linear",
    reference=nm_int_linear,
    adjoint=adjoint(dense),
    out_features=lambda x, weight, *_: weight.shape[0],
    inputs=inputs,
    cases=[
        *(_case(1, 128, 33, 2, 4, bits, 4, zero=True) for bits in (2, 3, 4, 8)),
        _case(3, 96, 17, 4, 8, 4, 1),
        _case(17, 256, 65, 2, 4, 4, 2, zero=True),
        _case(3, 128, 33, 2, 4, 4, 4, zero=True, g_idx=True),
        _case([2, 3], 45, 7, 1, 3, 3, 1, zero=True),
        _case(17, 64, 5, 2, 4, 8, 1, per_tensor=True),
    ],
    backends={"triton": "effbench.kernels.nm_int_linear.triton:nm_int_linear"},
    timed=timed(lambda inputs, _: {"n": 2, "m": 4, "bits": 4, "groups": inputs // 128, "zero": True}),
)
