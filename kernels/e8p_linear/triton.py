"""`e8p_linear` in Triton: a readable first version; one table look-up per 8 weights."""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import count_rows, launch_linear
from effbench.kernels._common.tiles import add_product, finish_sum, start_sum, store
from effbench.kernels.e8p_linear.codebook import ONE_BIT, PATTERNS
from effbench.kernels.e8p_linear.reference import E8PMatrix


@cache
def _build_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Patterns, 2 bits per coordinate (value - 1/2) and bit 16 (odd sum); points, 4 bits (2 value + 4)."""
    place = torch.arange(8, dtype=torch.int32)
    patterns = ((PATTERNS - 0.5).int() << 2 * place).sum(1) | (PATTERNS.sum(1) % 2).int() << 16
    points = ((2 * ONE_BIT + 4).int() << 4 * place).sum(1)
    return patterns.int().to(device), points.int().to(device)


@triton.jit
def _e8p_points(codes, table):
    """Points [BLOCK_N, BLOCK_K / 8, 8] of 16-bit codes [BLOCK_N, BLOCK_K / 8]."""
    codes = codes.to(tl.int32)
    # 1. The high byte picks a pattern of absolute values.
    pattern = tl.load(table + (codes >> 8 & 255))
    # 2. The parity of the low byte says which way the point is shifted, and turns its own lowest sign bit.
    parity = codes ^ codes >> 4
    parity = parity ^ parity >> 2
    parity = (parity ^ parity >> 1) & 1
    # 3. Sign bit p negates coordinate ORDER[p] of the codebook, so coordinate i has bit i // 2 + i % 2 * 4. Bit 8 holds
    #    the sign that a pattern of odd sum adds to coordinate 7, which has bit 7.
    signs = (codes ^ parity) & 255 | (pattern >> 8 & 256)
    i = tl.arange(0, 8)[None, None, :]
    negative = signs[:, :, None] >> (i // 2 + i % 2 * 4)
    negative = (tl.where(i == 7, negative ^ negative >> 1, negative) & 1) != 0
    # 4. Two bits a coordinate are its absolute value minus 1/2; then signs, and the shift by 1/4.
    value = (pattern[:, :, None] >> 2 * i & 3).to(tl.float32) + 0.5
    return tl.where(negative, -value, value) + (0.25 - 0.5 * parity.to(tl.float32))[:, :, None]


@triton.jit
def _one_bit_points(codes, table):
    """Points [BLOCK_N, BLOCK_K / 8, 8] of 8-bit codes [BLOCK_N, BLOCK_K / 8]."""
    packed = tl.load(table + codes.to(tl.int32))
    i = tl.arange(0, 8)[None, None, :]
    return (packed[:, :, None] >> 4 * i & 15).to(tl.float32) * 0.5 - 2.0


@triton.jit
def _e8p_linear(
    x,
    weight,
    scale,
    residual,
    patterns,
    points,
    inverse_residual_scale,
    y,
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = start_sum(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, IN, BLOCK_K):
        # One code for 8 inputs: a point of the codebook, and with more than 2 bits a second, finer one, added after
        # division by its scale (residual vector quantization, as in QuIP#, arXiv:2402.04396).
        column = (start // 8 + tl.arange(0, BLOCK_K // 8))[None, :]
        at = rows[:, None] * (IN // 8) + column
        inside = (rows[:, None] < OUT) & (column < IN // 8)
        decoded = _e8p_points(tl.load(weight + at, mask=inside, other=0), patterns)
        if residual is not None:
            codes = tl.load(residual + at, mask=inside, other=0)
            if codes.dtype == tl.uint8:
                decoded += _one_bit_points(codes, points) * inverse_residual_scale
            else:
                decoded += _e8p_points(codes, patterns) * inverse_residual_scale
        decoded = tl.reshape(decoded, (BLOCK_N, BLOCK_K))
        total = add_product(total, x, start, M, decoded, IN, BLOCK_M, BLOCK_K)
    store(y, finish_sum(total, BLOCK_M) * tl.load(scale), rows, M, OUT, BLOCK_M)


def e8p_linear(x: Tensor, matrix: E8PMatrix) -> Tensor:
    """See `E8PMatrix`."""
    return launch_linear(
        _e8p_linear,
        x,
        matrix.out_features(x.shape[-1]),
        matrix.weight,
        matrix.scale,
        matrix.residual,
        *_build_tables(x.device),
        1 / matrix.residual_scale,
        block_k=128 if count_rows(x) == 1 else 64,
    )
