"""`int_linear` in Triton: a readable first version, one program per block of output rows."""

import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import largest_power, launch_linear
from effbench.kernels._common.tiles import add_product, finish_sum, load_codes, load_zeros, start_sum, store
from effbench.kernels.int_linear.reference import IntMatrix


@triton.jit
def _int_linear(
    x,
    weight,
    scale,
    zero,
    g_idx,
    y,
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,  # of scale: OUT or 1
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # inputs of a group; the last one may have fewer
    GATHER: tl.constexpr,  # a tile has weights of several groups
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_row = (rows if ROWS > 1 else rows * 0)[:, None]
    total = start_sum(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, IN, BLOCK_K):
        codes = load_codes(weight, rows, start, OUT, IN, BITS, BLOCK_K)
        if GATHER:
            column = (start + tl.arange(0, BLOCK_K))[None, :]
            inside = (scale_row < ROWS) & (column < IN)
            if g_idx is not None:
                group = tl.load(g_idx + column, mask=column < IN, other=0).to(tl.int32)
            else:
                group = column // SIZE
        else:
            inside = scale_row < ROWS
            group = start // SIZE
        step = tl.load(scale + scale_row * GROUPS + group, mask=inside, other=0).to(tl.float32)
        if zero is not None:
            middle = load_zeros(zero, scale_row, group, inside, ROWS, GROUPS, BITS)
            decoded = step * (codes - middle).to(tl.float32)
        else:
            decoded = step * (codes - (1 << BITS - 1)).to(tl.float32)
        total = add_product(total, x, start, M, decoded, IN, BLOCK_M, BLOCK_K)
    store(y, finish_sum(total, BLOCK_M), rows, M, OUT, BLOCK_M)


def int_linear(x: Tensor, matrix: IntMatrix) -> Tensor:
    """See `IntMatrix`."""
    in_features, groups = x.shape[-1], matrix.scale.shape[1]
    block_k = 128
    size = matrix.group_size or in_features
    aligned = groups == 1 or (matrix.g_idx is None and largest_power(size, block_k) >= 32)
    if groups > 1 and aligned:
        block_k = largest_power(size, block_k)
    return launch_linear(
        _int_linear,
        x,
        matrix.out_features(in_features),
        matrix.weight,
        matrix.scale,
        matrix.zero,
        matrix.g_idx,
        block_k=block_k,
        BITS=matrix.bits,
        ROWS=matrix.scale.shape[0],
        GROUPS=groups,
        SIZE=size,
        GATHER=not aligned,
    )
