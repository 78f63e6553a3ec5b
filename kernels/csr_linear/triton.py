"""`csr_linear` in Triton: a readable first version, one program per few rows; inputs are gathered by column.

x is transposed first, so that the inputs of one column lie side by side for all rows of a batch, which is filled up
with zeros so that they can be read several at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import covering_power, launch, matrix
from effbench.kernels._common.tiles import store
from effbench.ops import Declined

LARGEST = 32  # rows of a batch that one program works on


@triton.jit
def _csr_linear(
    x,  # [IN, STRIDE], or [IN] for a batch of one
    crow,
    col,
    values,
    y,
    M,
    STRIDE,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles are flat, BLOCK_K entries of every row after another, so that neighbours are read by neighbouring threads.
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


def csr_linear(x: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> Tensor:
    """See `reference.csr_linear`."""
    if x.dtype == torch.float64:  # which is more than the sums have
        raise Declined
    flat = matrix(x)
    batch, in_features = flat.shape
    out_features = len(crow) - 1
    inputs = flat
    if batch > 1:
        inputs = flat.new_zeros(in_features, triton.cdiv(batch, LARGEST) * LARGEST)
        inputs[:, :batch] = flat.T
    block_m = min(covering_power(batch), LARGEST)
    block_n, block_k, num_warps = (4, 128, 1) if batch == 1 else (4, min(64, 1024 // block_m), 4)
    y = torch.empty(batch, out_features, dtype=x.dtype, device=x.device)
    launch(
        _csr_linear,
        (triton.cdiv(out_features, block_n), triton.cdiv(batch, block_m)),
        inputs,
        crow.contiguous(),
        col.contiguous(),
        values.contiguous(),
        y,
        batch,
        inputs.shape[1],
        OUT=out_features,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        numbers=block_n * block_k,
        num_warps=num_warps,
    )
    return y.view(*x.shape[:-1], out_features)
