"""What `hadamard` is called with, and how it is checked."""

import math
from collections.abc import Sequence

from effbench.kernels.hadamard.matrices import factors
from effbench.kernels.hadamard.reference import Rotation, hadamard
from effbench.ops import LinearOp


def count_flops(x: Sequence[int], out: Sequence[int]) -> int:
    """Additions of the fast transform: log2 of the power-of-two part, and m for the rest, per number."""
    power, m = factors(x[-1])
    return math.prod(x) * (power.bit_length() - 1 + (2 * m if m > 1 else 0))


OP = LinearOp(
    name="hadamard",
    matrix=Rotation,
    random=lambda case, dtype, on: Rotation(case.get("transpose", False)),
    product=hadamard,
    adjoint=lambda grad, in_features, rotation: hadamard(grad, Rotation(not rotation.transpose)),
    cases=[
        *(dict(batch=1, in_features=n) for n in (1, 2, 64, 128, 256, 384)),
        *(dict(batch=3, in_features=n, transpose=True) for n in (12, 56, 128, 344)),
        *(dict(batch=17, in_features=n) for n in (16, 40, 768)),
        dict(batch=[2, 3], in_features=512),
    ],
    shape_flops=count_flops,
    backends={"triton": "effbench.kernels.hadamard.triton:hadamard"},
    timed=[dict(batch=batch, in_features=n) for n in (1024, 4096, 14336) for batch in (1, 16)],
)
