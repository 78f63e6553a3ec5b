"""`nm_int_linear` in Triton: a readable first version, one program per block of output rows."""

import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import count_rows, launch_linear
from effbench.kernels._common.nm import place_bits
from effbench.kernels._common.tiles import add_product, finish_sum, load_places, load_zeros, start_sum, store
from effbench.kernels.nm_int_linear.reference import NmIntMatrix


@triton.jit
def _nm_int_linear(
    x,
    weight,
    index,
    scale,
    zero,
    g_idx,
    y,
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KEEP: tl.constexpr,
    OF: tl.constexpr,  # of every OF inputs KEEP are stored
    PLACE_BITS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,  # of scale: OUT or 1
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # inputs of a group; the last one may have fewer
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    STORED: tl.constexpr = IN // OF * KEEP
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_row = (rows if ROWS > 1 else rows * 0)[:, None]
    total = start_sum(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, IN, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < OUT) & (column[None, :] < IN)
        if g_idx is not None:
            group = tl.load(g_idx + column, mask=column < IN, other=0).to(tl.int32)[None, :]
        else:
            group = (column // SIZE)[None, :]
        origin = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.int32) + (1 << BITS - 1)
        if zero is not None:
            origin = load_zeros(zero, scale_row, group, inside, ROWS, GROUPS, BITS)
        level = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.int32)
        for i in tl.static_range(KEEP):
            at = column // OF * KEEP + i
            here = load_places(index, rows, at, inside, STORED, PLACE_BITS) == column[None, :] % OF
            level = tl.where(here, load_places(weight, rows, at, inside, STORED, BITS) - origin, level)
        step = tl.load(scale + scale_row * GROUPS + group, mask=inside, other=0).to(tl.float32)
        total = add_product(total, x, start, M, step * level.to(tl.float32), IN, BLOCK_M, BLOCK_K)
    store(y, finish_sum(total, BLOCK_M), rows, M, OUT, BLOCK_M)


def nm_int_linear(x: Tensor, matrix: NmIntMatrix) -> Tensor:
    """See `NmIntMatrix`."""
    return launch_linear(
        _nm_int_linear,
        x,
        matrix.out_features(x.shape[-1]),
        matrix.weight,
        matrix.places,
        matrix.scale,
        matrix.zero,
        matrix.g_idx,
        block_k=128 if count_rows(x) == 1 else 32,  # more would not fit in registers
        KEEP=matrix.n,
        OF=matrix.m,
        PLACE_BITS=place_bits(matrix.m),
        BITS=matrix.bits,
        ROWS=matrix.scale.shape[0],
        GROUPS=matrix.scale.shape[1],
        SIZE=matrix.group_size or x.shape[-1],
    )
