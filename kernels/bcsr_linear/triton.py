"""`bcsr_linear` in Triton: a readable first version, one program per block row; blocks are worked off side by side."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import covering_power, launch, matrix
from effbench.kernels._common.tiles import store
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
    R: tl.constexpr,
    C: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,  # R, rounded up
    BLOCK_K: tl.constexpr,
):
    row = tl.arange(0, BLOCK_R)
    batch = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.load(crow + tl.program_id(0) + 1) * C
    if DOT:
        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_R, BLOCK_K), dtype=tl.float32)
    for start in range(tl.load(crow + tl.program_id(0)) * C, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # columns of all blocks
        block = k // C
        column = tl.load(col + block, mask=k < end, other=0).to(tl.int32) * C + k % C
        tile = tl.load(
            x + batch[:, None] * IN + column[None, :], mask=(batch[:, None] < M) & (k[None, :] < end), other=0
        )
        weight = tl.load(
            values + (block[None, :] * R + row[:, None]) * C + (k % C)[None, :],
            mask=(row[:, None] < R) & (k[None, :] < end),
            other=0,
        )
        if DOT:
            total = tl.dot(tile, tl.trans(weight.to(tile.dtype)), total, input_precision="ieee")
        else:
            total += tile.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]
    if not DOT:
        total = tl.sum(total, axis=2)
    # Rows that only fill the tile up belong to the next block.
    store(y, total, tl.where(row < R, tl.program_id(0) * R + row, OUT), M, OUT, BLOCK_M)


def bcsr_linear(x: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> Tensor:
    """See `reference.bcsr_linear`."""
    flat = matrix(x)
    batch, in_features = flat.shape
    _, rows, columns = values.shape
    out_features = (len(crow) - 1) * rows
    block_r = covering_power(rows)
    if x.dtype == torch.float64 or block_r > 1024:  # more than the sums have, more than fits into a program
        raise Declined
    dot = batch > 1 and block_r >= 8
    if dot:
        block_m, block_k, num_warps = 16, max(16, min(128, 4096 // block_r)), 4
    else:  # 16 partial sums a thread
        block_m, num_warps = min(covering_power(batch), 16), 4 if block_r >= 8 else 1
        block_k = max(16, 512 * num_warps // (block_r * block_m))
    y = torch.empty(batch, out_features, dtype=x.dtype, device=x.device)
    launch(
        _bcsr_linear,
        (len(crow) - 1, triton.cdiv(batch, block_m)),
        flat,
        crow.contiguous(),
        col.contiguous(),
        values.contiguous(),
        y,
        batch,
        IN=in_features,
        OUT=out_features,
        R=rows,
        C=columns,
        DOT=dot,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        numbers=block_r * block_k,
        num_warps=num_warps,
    )
    return y.view(*x.shape[:-1], out_features)
