"""`fp8_linear` in Triton: a readable first version that converts to 16 bits (exactly) before it multiplies."""

import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import flatten_rows, launch_linear
from effbench.kernels._common.tiles import add_product, finish_sum, start_sum, store
from effbench.kernels.fp8_linear.reference import Fp8Matrix, quantize


@triton.jit
def _fp8_linear(
    x,
    weight,
    scale,
    factor,
    y,
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    PER_ROW: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = start_sum(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, IN, BLOCK_K):
        column = (start + tl.arange(0, BLOCK_K))[None, :]
        inside = (rows[:, None] < OUT) & (column < IN)
        decoded = tl.load(weight + rows[:, None] * IN + column, mask=inside, other=0.0).to(tl.float32)
        total = add_product(total, x, start, M, decoded, IN, BLOCK_M, BLOCK_K)
    result = finish_sum(total, BLOCK_M)
    if PER_ROW:
        result *= tl.load(scale + rows, mask=rows < OUT, other=0)[None, :]
    else:
        result *= tl.load(scale)
    if factor is not None:
        if PER_TOKEN:
            token = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
            result *= tl.load(factor + token, mask=token < M, other=0)[:, None]
        else:
            result *= tl.load(factor)
    store(y, result, rows, M, OUT, BLOCK_M)


def fp8_linear(x: Tensor, matrix: Fp8Matrix) -> Tensor:
    """See `reference.fp8_linear`."""
    flat, factor = flatten_rows(x), None
    if matrix.activations != "none":
        flat, factor = quantize(flat, matrix.activations)
    y = launch_linear(
        _fp8_linear,
        flat,
        matrix.out_features(x.shape[-1]),
        matrix.weight,
        matrix.scale,
        factor,
        block_k=128,
        dtype=x.dtype,
        PER_ROW=matrix.scale.numel() > 1,
        PER_TOKEN=matrix.activations == "token",
    )
    return y.view(*x.shape[:-1], matrix.out_features(x.shape[-1]))
