"""What `int_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.dense import activations, adjoint, scales, words
from effbench.kernels._common.packing import word_count
from effbench.kernels._common.shapes import LINEARS, timed
from effbench.kernels.int_linear.reference import dense, int_linear
from effbench.ops import TOLERANCE, Case, Goal, Op, Peer


def inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Fields of a case: batch, in_features, out_features, bits, groups; per_tensor, zero, g_idx (or False)."""
    out, groups, bits = case["out_features"], case["groups"], case["bits"]
    rows = 1 if case.get("per_tensor") else out
    on: dict[str, Any] = {"device": device, "generator": generator}
    shuffled = torch.randperm(case["in_features"], **on) % groups
    return {
        "x": activations(case, device, dtype, generator),
        "weight": words(out, word_count(case["in_features"], bits), **on),
        "scale": scales(rows, groups, **on).half(),
        "zero": words(word_count(rows, bits), groups, **on) if case.get("zero") else None,
        "g_idx": shuffled.to(torch.int32) if case.get("g_idx") else None,
        "bits": bits,
    }


def _case(batch: int | list[int], in_features: int, out_features: int, bits: int, groups: int, **more: bool) -> Case:
    return dict(batch=batch, in_features=in_features, out_features=out_features, bits=bits, groups=groups, **more)


OP = Op(
    name="int_linear",
    reference=int_linear,
    adjoint=adjoint(dense),
    out_features=lambda x, weight, *_: weight.shape[0],
    inputs=inputs,
    cases=[
        *(_case(1, 128, 33, bits, 4, zero=True) for bits in (2, 3, 4, 8)),
        *(_case(3, 96, 17, bits, 1) for bits in (2, 3, 4, 8)),
        _case(17, 256, 65, 4, 2, zero=True),
        _case(17, 96, 40, 3, 2, zero=True),
        _case(3, 128, 33, 4, 4, zero=True, g_idx=True),
        _case(1, 128, 33, 3, 4, g_idx=True),
        _case([2, 3], 45, 7, 3, 1, zero=True),
        _case(3, 45, 7, 4, 5),
        _case(1, 77, 1, 2, 1, per_tensor=True, zero=True),
        _case(17, 64, 5, 8, 1, per_tensor=True),
        _case(1, 384, 33, 4, 3, zero=True),
        _case(2, 256, 40, 4, 4),
        _case(1, 1152, 40, 4, 12, zero=True),  # split along the input; a third of a tile in a group
        _case(8, 640, 17, 4, 20, zero=True),
        _case(16, 1300, 65, 4, 1, zero=True),
        _case(64, 256, 129, 4, 2),
        _case([4, 16], 192, 30, 4, 3, zero=True),
        _case(65, 64, 5, 4, 1),
    ],
    backends={
        "triton_w4": "effbench.kernels.int_linear.triton_w4:int_linear",
        "triton": "effbench.kernels.int_linear.triton:int_linear",
    },
    timed=[
        *timed(lambda inputs, _: {"bits": 4, "groups": inputs // 128, "zero": True}, LINEARS, (1, 16, 64)),
        *(_case(1, 8192, 28672, bits, 64, zero=True) for bits in (2, 3, 8)),
    ],
    peers={
        name: Peer(f"effbench.kernels.int_linear.peers:{name}", package, TOLERANCE | {"bfloat16": 3.2e-2}, note)
        for name, package, note in (
            ("tinygemm", "torch", "scales and shifts in the type of x"),
            ("gemlite", "gemlite", "scales and zeros in the type of x"),
        )
    },
    goals=[
        Goal(
            device="H200",
            batch=1,
            least_bytes=120_000_000,
            must={"dense_speedup": 2.4, "copy_percent": 65},
            target={"dense_speedup": 3.5, "copy_percent": 90},
        )
    ],
)
