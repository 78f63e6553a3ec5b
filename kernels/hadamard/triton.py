"""`hadamard` in Triton: a readable first version; whole rows stay in registers."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import covering_power, flatten_rows, launch
from effbench.kernels.hadamard.matrices import base, factors
from effbench.kernels.hadamard.reference import Rotation
from effbench.ops import Declined

LARGEST = 1 << 14  # numbers of one program: 64 registers each for 256 threads


@cache
def _pad_base(m: int, transpose: bool, device: torch.device) -> Tensor:
    """base(m)^T (or base(m)) with zeros to a power of two, float32: right factor of the first step."""
    size = covering_power(max(m, 16))
    matrix = torch.zeros(size, size)
    entries = torch.from_numpy(base(m)).float()
    matrix[:m, :m] = entries if transpose else entries.T
    return matrix.to(device)


@triton.jit
def _hadamard(
    x,
    right,
    y,
    M,
    POWER: tl.constexpr,
    STAGES: tl.constexpr,  # log2 of POWER
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A vector of n = POWER * SIZE numbers is POWER rows of the tile, SIZE consecutive numbers each. H is the Kronecker
    # product Sylvester(POWER) (x) base(SIZE), so base goes over the numbers of a row and Sylvester's matrix over the
    # rows.
    piece = tl.arange(0, BLOCK_M * POWER)
    number = tl.program_id(0) * BLOCK_M * POWER + piece
    inner = tl.arange(0, PADDED)
    inside = (number[:, None] < M * POWER) & (inner[None, :] < SIZE)
    # 1. Multiply every row by base(SIZE), BLOCK_K numbers at a time, as a matrix product; nothing to do for SIZE = 1.
    if SIZE == 1:
        tile = tl.load(x + number[:, None] + inner[None, :], mask=inside, other=0).to(tl.float32)
    else:
        tile = tl.zeros((BLOCK_M * POWER, PADDED), dtype=tl.float32)
        for start in range(0, SIZE, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            part = tl.load(
                x + number[:, None] * SIZE + k[None, :],
                mask=(number[:, None] < M * POWER) & (k[None, :] < SIZE),
                other=0,
            ).to(tl.float32)
            matrix = tl.load(right + k[:, None] * PADDED + inner[None, :])
            tile = tl.dot(part, matrix, tile, input_precision="ieee")
    # 2. Multiply by Sylvester's matrix in its fast transform, Sylvester(2n) = [[1, 1], [1, -1]] (x) Sylvester(n): stage
    #    by stage, the sum and the difference of two neighbouring rows, which together are one row of the next stage.
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(tile, (BLOCK_M * (POWER >> stage + 1), 2, PADDED << stage))
        left, other = tl.split(tl.permute(pairs, (0, 2, 1)))
        tile = tl.permute(tl.join(left + other, left - other), (0, 2, 1))
    # 3. Divide by sqrt(n), so that H is orthonormal, and store.
    tile = tl.reshape(tile, (BLOCK_M * POWER, PADDED)) * NORM
    tl.store(y + number[:, None] * SIZE + inner[None, :], tile.to(y.dtype.element_ty), mask=inside)


def hadamard(x: Tensor, rotation: Rotation) -> Tensor:
    """See `reference.hadamard`; Declined where a row does not fit into one program."""
    n = x.shape[-1]
    power, m = factors(n)
    padded = 1 if m == 1 else covering_power(max(m, 16))
    if power * padded > LARGEST:
        raise Declined(f"rows of {n} numbers do not fit")
    flat = flatten_rows(x)
    rows = max(1, 1024 // (power * padded), 16 // power if m > 1 else 1)
    y = torch.empty_like(flat)
    launch(
        _hadamard,
        (triton.cdiv(len(flat), rows),),
        flat,
        None if m == 1 else _pad_base(m, rotation.transpose, x.device),
        y,
        len(flat),
        POWER=power,
        STAGES=power.bit_length() - 1,
        SIZE=m,
        PADDED=padded,
        NORM=n**-0.5,
        BLOCK_M=rows,
        BLOCK_K=16,
        numbers=rows * n,
        num_warps=8 if power * padded > 4096 else 4,
    )
    return y.view(x.shape)
