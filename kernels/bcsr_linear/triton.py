"""`bcsr_linear` in Triton: a readable first version, one program per block row; blocks are processed side by side."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import Tile, count_rows, covering_power, launch_linear
from effbench.kernels._common.tiles import store
from effbench.kernels.bcsr_linear.reference import BcsrMatrix
from effbench.ops import Declined


@triton.jit
def _bcsr_linear(
    x,
    crow,
    col,
    values,
    y,
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,  # of a block
    DOT: tl.constexpr,
    PADDED_ROWS: tl.constexpr,  # of a block, rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of a block
    BLOCK_K: tl.constexpr,
):
    row = tl.arange(0, PADDED_ROWS)
    batch = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.load(crow + tl.program_id(0) + 1) * COLUMNS
    if DOT:
        total = tl.zeros((BLOCK_M, PADDED_ROWS), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, PADDED_ROWS, BLOCK_K), dtype=tl.float32)
    for start in range(tl.load(crow + tl.program_id(0)) * COLUMNS, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # columns of all blocks
        block = k // COLUMNS
        column = tl.load(col + block, mask=k < end, other=0).to(tl.int32) * COLUMNS + k % COLUMNS
        tile = tl.load(
            x + batch[:, None] * IN + column[None, :], mask=(batch[:, None] < M) & (k[None, :] < end), other=0
        )
        weight = tl.load(
            values + (block[None, :] * BLOCK_N + row[:, None]) * COLUMNS + (k % COLUMNS)[None, :],
            mask=(row[:, None] < BLOCK_N) & (k[None, :] < end),
            other=0,
        )
        if DOT:
            total = tl.dot(tile, tl.trans(weight.to(tile.dtype)), total, input_precision="ieee")
        else:
            total += tile.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
    if not DOT:
        total = tl.sum(total, axis=2)
    # Rows that only fill up the tile are rows of the next block: they are not stored here.
    store(y, total, tl.where(row < BLOCK_N, tl.program_id(0) * BLOCK_N + row, OUT), M, OUT, BLOCK_M)


def bcsr_linear(x: Tensor, matrix: BcsrMatrix) -> Tensor:
    """See `BcsrMatrix`; Declined for float64 and for blocks of more than 1,024 rows."""
    batch = count_rows(x)
    _, rows, columns = matrix.values.shape
    padded = covering_power(rows)
    if x.dtype == torch.float64 or padded > 1024:
        raise Declined("sums have float32, and a program at most 1,024 rows")
    dot = batch > 1 and padded >= 8
    if dot:
        block_m, block_k, num_warps = 16, max(16, min(128, 4096 // padded)), 4
    else:  # 16 partial sums a thread
        block_m, num_warps = min(covering_power(batch), 16), 4 if padded >= 8 else 1
        block_k = max(16, 512 * num_warps // (padded * block_m))
    return launch_linear(
        _bcsr_linear,
        x,
        matrix.out_features(x.shape[-1]),
        *matrix,
        block_k=block_k,
        tile=Tile(block_m, rows, num_warps),
        COLUMNS=columns,
        DOT=dot,
        PADDED_ROWS=padded,
    )
