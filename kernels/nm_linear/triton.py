"""`nm_linear` in Triton: a readable first version, one program per block of output rows."""

import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import launch_linear
from effbench.kernels._common.nm import place_bits
from effbench.kernels._common.tiles import add_product, finish_sum, load_places, start_sum, store
from effbench.kernels.nm_linear.reference import NmMatrix


@triton.jit
def _nm_linear(
    x,
    values,
    index,
    y,
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KEEP: tl.constexpr,
    OF: tl.constexpr,  # of every OF inputs KEEP are stored
    PLACE_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    STORED: tl.constexpr = IN // OF * KEEP
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = start_sum(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, IN, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < OUT) & (column[None, :] < IN)
        decoded = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for i in tl.static_range(KEEP):
            at = column // OF * KEEP + i
            here = inside & (load_places(index, rows, at, inside, STORED, PLACE_BITS) == column[None, :] % OF)
            decoded += tl.load(values + rows[:, None] * STORED + at[None, :], mask=here, other=0).to(tl.float32)
        total = add_product(total, x, start, M, decoded, IN, BLOCK_M, BLOCK_K)
    store(y, finish_sum(total, BLOCK_M), rows, M, OUT, BLOCK_M)


def nm_linear(x: Tensor, matrix: NmMatrix) -> Tensor:
    """See `NmMatrix`."""
    return launch_linear(
        _nm_linear,
        x,
        matrix.out_features(x.shape[-1]),
        matrix.values,
        matrix.places,
        block_k=128,
        KEEP=matrix.n,
        OF=matrix.m,
        PLACE_BITS=place_bits(matrix.m),
    )
