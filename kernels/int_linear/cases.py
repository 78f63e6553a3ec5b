"""What `int_linear` is called with, and how it is checked."""

from typing import Any

import torch

from effbench.kernels._common.packing import word_count
from effbench.kernels._common.random import random_grid, random_words
from effbench.kernels._common.shapes import LINEARS, size_cases
from effbench.kernels.int_linear.reference import IntMatrix
from effbench.ops import TOLERANCE, Case, Goal, LinearOp, Peer, linear_case


def random_matrix(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> IntMatrix:
    """Fields of a case: those of `random_grid`."""
    codes = random_words(case["out_features"], word_count(case["in_features"], case["bits"]), **on)
    return IntMatrix(codes, **random_grid(case, on))


OP = LinearOp(
    name="int_linear",
    matrix=IntMatrix,
    random=random_matrix,
    cases=[
        *(linear_case(1, 128, 33, bits=bits, group_size=32, zero=True) for bits in (2, 3, 4, 8)),
        *(linear_case(3, 96, 17, bits=bits) for bits in (2, 3, 4, 8)),
        linear_case(17, 256, 65, bits=4, group_size=128, zero=True),
        linear_case(17, 96, 40, bits=3, group_size=48, zero=True),
        linear_case(3, 128, 33, bits=4, group_size=32, zero=True, g_idx=True),
        linear_case(1, 128, 33, bits=3, group_size=32, g_idx=True),
        linear_case([2, 3], 45, 7, bits=3, zero=True),
        linear_case(3, 45, 7, bits=4, group_size=9),
        linear_case(1, 77, 1, bits=2, per_tensor=True, zero=True),
        linear_case(17, 64, 5, bits=8, per_tensor=True),
        linear_case(1, 384, 33, bits=4, group_size=128, zero=True),
        linear_case(2, 256, 40, bits=4, group_size=64),
        linear_case(1, 1152, 40, bits=4, group_size=96, zero=True),  # split along the input, several groups in a tile
        linear_case(8, 640, 17, bits=4, group_size=32, zero=True),
        linear_case(16, 1300, 65, bits=4, zero=True),
        linear_case(64, 256, 129, bits=4, group_size=128),
        linear_case([4, 16], 192, 30, bits=4, group_size=64, zero=True),
        linear_case(65, 64, 5, bits=4),
        # the last group is shorter: half of one, a remainder beyond the last whole tile, or all there is
        *(linear_case(1, 576, 33, bits=bits, group_size=128, zero=True) for bits in (2, 3, 4, 8)),
        linear_case(17, 960, 40, bits=4, group_size=128),
        linear_case(3, 100, 17, bits=4, group_size=64, zero=True),
        linear_case(17, 100, 9, bits=3, group_size=48, zero=True),
        linear_case(3, 100, 9, bits=4, group_size=32, zero=True, g_idx=True),
        linear_case(2, 100, 9, bits=4, group_size=128, zero=True),
    ],
    backends={
        "triton_w4": "effbench.kernels.int_linear.triton_w4:int_linear",
        "triton": "effbench.kernels.int_linear.triton:int_linear",
    },
    timed=[
        *size_cases(lambda *_: {"bits": 4, "group_size": 128, "zero": True}, LINEARS, (1, 16, 64)),
        *(linear_case(1, 8192, 28672, bits=bits, group_size=128, zero=True) for bits in (2, 3, 8)),
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
            must={"speedup": 2.4, "copy_percent": 65},
            target={"speedup": 3.5, "copy_percent": 90},
        )
    ],
)
