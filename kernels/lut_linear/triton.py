"""`lut_linear` in Triton: a readable first version; levels are looked up in the cache, outliers added at the end."""

import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import largest_power, launch_linear
from effbench.kernels._common.tiles import add_product, finish_sum, load_codes, start_sum, store
from effbench.kernels.lut_linear.reference import LutMatrix


@triton.jit
def _lut_linear(
    x,
    weight,
    lut,
    absmax,
    crow,
    col,
    values,
    y,
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BITS: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows[:, None] < OUT
    total = start_sum(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, IN, BLOCK_K):
        codes = load_codes(weight, rows, start, OUT, IN, BITS, BLOCK_K)
        level = codes + rows[:, None] * (1 << BITS) if PER_ROW else codes
        decoded = tl.load(lut + level, mask=inside, other=0).to(tl.float32)
        if absmax is not None:
            if IN % BLOCK == 0 and BLOCK % BLOCK_K == 0:
                number = rows[:, None] * (IN // BLOCK) + start // BLOCK
                decoded = decoded * tl.load(absmax + number, mask=inside, other=0)
            else:
                column = (start + tl.arange(0, BLOCK_K))[None, :]
                number = (rows[:, None] * IN + column) // BLOCK
                decoded = decoded * tl.load(absmax + number, mask=inside & (column < IN), other=0)
        total = add_product(total, x, start, M, decoded, IN, BLOCK_M, BLOCK_K)
    result = finish_sum(total, BLOCK_M)
    if crow is not None:
        batch = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        first = tl.load(crow + rows, mask=rows < OUT, other=0)
        number = tl.load(crow + rows + 1, mask=rows < OUT, other=0) - first
        for i in range(tl.max(number)):
            valid = i < number
            column = tl.load(col + first + i, mask=valid, other=0).to(tl.int32)
            value = tl.load(values + first + i, mask=valid, other=0).to(tl.float32)
            at = tl.load(x + batch * IN + column[None, :], mask=(batch < M) & valid[None, :], other=0)
            result += at.to(tl.float32) * value[None, :]
    store(y, result, rows, M, OUT, BLOCK_M)


def lut_linear(x: Tensor, matrix: LutMatrix) -> Tensor:
    """See `LutMatrix`."""
    return launch_linear(
        _lut_linear,
        x,
        matrix.out_features(x.shape[-1]),
        matrix.weight,
        matrix.lut,
        matrix.absmax,
        matrix.crow,
        matrix.col,
        matrix.values,
        block_k=max(32, largest_power(matrix.block, 128)) if matrix.block else 128,
        BITS=matrix.bits,
        PER_ROW=matrix.lut.dim() == 2,
        BLOCK=matrix.block,
    )
