"""`nm_linear` in Triton: a readable first version, one program per block of output rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import launch, matrix, tile
from effbench.kernels._common.nm import place_bits
from effbench.kernels._common.tiles import add_product, empty_sum, finished, load_places, store


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
    total = empty_sum(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, IN, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < OUT) & (column[None, :] < IN)
        decoded = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for i in tl.static_range(KEEP):
            at = column // OF * KEEP + i
            here = inside & (load_places(index, rows, at, inside, STORED, PLACE_BITS) == column[None, :] % OF)
            decoded += tl.load(values + rows[:, None] * STORED + at[None, :], mask=here, other=0).to(tl.float32)
        total = add_product(total, x, start, M, decoded, IN, BLOCK_M, BLOCK_K)
    store(y, finished(total, BLOCK_M), rows, M, OUT, BLOCK_M)


def nm_linear(x: Tensor, values: Tensor, index: Tensor, n: int, m: int) -> Tensor:
    """See `reference.nm_linear`."""
    flat = matrix(x)
    batch, in_features = flat.shape
    out_features = values.shape[0]
    block_m, block_n, num_warps = tile(batch)
    block_k = 128
    y = torch.empty(batch, out_features, dtype=x.dtype, device=x.device)
    launch(
        _nm_linear,
        (triton.cdiv(out_features, block_n), triton.cdiv(batch, block_m)),
        flat,
        values.contiguous(),
        index.contiguous(),
        y,
        batch,
        IN=in_features,
        OUT=out_features,
        KEEP=n,
        OF=m,
        PLACE_BITS=place_bits(m),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        numbers=block_n * block_k,
        num_warps=num_warps,
    )
    return y.view(*x.shape[:-1], out_features)
