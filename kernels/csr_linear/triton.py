"""`csr_linear` in Triton: a readable first version, one program per few rows; inputs are gathered by column.

x is transposed first, so that the inputs of one column lie side by side for all rows of a batch, which is filled up
with zeros so that they can be read several at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import Tile, covering_power, flatten_rows, launch_linear
from effbench.kernels._common.tiles import store
from effbench.kernels.csr_linear.reference import CsrMatrix
from effbench.ops import Declined

LARGEST = 32  # rows of a batch that one program works on


@triton.jit
def _csr_linear(
    x,  # [IN, STRIDE], or [IN] for a batch of one
    STRIDE,
    crow,
    col,
    values,
    y,
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles are flat, BLOCK_K entries of one row after those of another, so that neighbouring threads read neighbours.
    place = tl.arange(0, BLOCK_N * BLOCK_K)
    row = tl.program_id(0) * BLOCK_N + place // BLOCK_K
    batch = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    entry = tl.load(crow + row, mask=row < OUT, other=0) + place % BLOCK_K
    end = tl.load(crow + row + 1, mask=row < OUT, other=0)
    if BLOCK_M == 1:
        total = tl.zeros((BLOCK_N * BLOCK_K,), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_N * BLOCK_K, BLOCK_M), dtype=tl.float32)
    for start in range(0, tl.max(end - entry), BLOCK_K):
        i = entry + start
        valid = i < end
        column = tl.load(col + i, mask=valid, other=0).to(tl.int32)
        value = tl.load(values + i, mask=valid, other=0).to(tl.float32)
        if BLOCK_M == 1:
            total += value * tl.load(x + column, mask=valid, other=0).to(tl.float32)
        else:
            tile = tl.load(x + column[:, None] * STRIDE + batch[None, :], mask=valid[:, None], other=0)
            total += value[:, None] * tile.to(tl.float32)
    result = tl.sum(tl.reshape(total, (BLOCK_N, BLOCK_K, BLOCK_M)), axis=1)
    store(y, tl.trans(result), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), M, OUT, BLOCK_M)


def csr_linear(x: Tensor, matrix: CsrMatrix) -> Tensor:
    """See `CsrMatrix`; Declined for float64."""
    if x.dtype == torch.float64:
        raise Declined("sums have float32")
    inputs = flatten_rows(x)
    batch, in_features = inputs.shape
    if batch > 1:
        turned = inputs.new_zeros(in_features, triton.cdiv(batch, LARGEST) * LARGEST)
        turned[:, :batch] = inputs.T
        inputs = turned
    block_m = min(covering_power(batch), LARGEST)
    return launch_linear(
        _csr_linear,
        x,
        matrix.out_features(in_features),
        inputs.shape[1],
        *matrix,
        block_k=128 if batch == 1 else min(64, 1024 // block_m),
        tile=Tile(block_m, 4, 1 if batch == 1 else 4),
        operand=inputs,
    )
