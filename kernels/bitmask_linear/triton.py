"""`bitmask_linear` in Triton: a readable first version, one program per block of output rows.

A program walks along its rows and counts the bits that it has passed: that many values lie before the next one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import launch_linear
from effbench.kernels._common.tiles import add_product, finish_sum, load_codes, start_sum, store
from effbench.kernels.bitmask_linear.reference import BitmaskMatrix
from effbench.ops import Declined


@triton.jit
def _bitmask_linear(
    x,
    crow,
    bits,
    values,
    y,
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    before = tl.load(crow + rows, mask=rows < OUT, other=0)
    total = start_sum(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, IN, BLOCK_K):
        kept = load_codes(bits, rows, start, OUT, IN, 1, BLOCK_K)
        place = before[:, None] + tl.cumsum(kept, axis=1) - 1
        weight = tl.load(values + place, mask=kept == 1, other=0).to(tl.float32)
        total = add_product(total, x, start, M, weight, IN, BLOCK_M, BLOCK_K)
        before += tl.sum(kept, axis=1)
    store(y, finish_sum(total, BLOCK_M), rows, M, OUT, BLOCK_M)


def bitmask_linear(x: Tensor, matrix: BitmaskMatrix) -> Tensor:
    """See `BitmaskMatrix`; Declined for float64."""
    if x.dtype == torch.float64:
        raise Declined("sums have float32")
    return launch_linear(_bitmask_linear, x, matrix.out_features(x.shape[-1]), *matrix, block_k=128)
