"""What the Triton kernels of the linear ops share: reading packed codes, multiplying by a decoded tile, storing.

A program owns BLOCK_N rows of the matrix and BLOCK_M rows of x. With BLOCK_M = 1 it keeps one partial sum per
decoded weight of a tile and adds them up at the end; otherwise it uses the tensor cores. Everything is widened to
float32 right after loading, except the operands of `tl.dot`.
"""

import triton
import triton.language as tl


@triton.jit
def load_codes(words, rows, start, OUT: tl.constexpr, IN: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes [BLOCK_N, BLOCK_K] of columns start ... of `rows`; 0 outside the matrix."""
    WORDS: tl.constexpr = (IN * BITS + 31) // 32
    inside = rows[:, None] < OUT
    if 32 % BITS == 0:
        PER_WORD: tl.constexpr = 32 // BITS
        word = start // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
        packed = tl.load(words + rows[:, None] * WORDS + word[None, :], mask=inside & (word[None, :] < WORDS), other=0)
        shift = tl.arange(0, PER_WORD) * BITS
        codes = packed[:, :, None] >> shift[None, None, :] & (1 << BITS) - 1
        return tl.reshape(codes, (rows.shape[0], BLOCK_K))
    bit = (start + tl.arange(0, BLOCK_K)) * BITS
    return _load_straddling(words + rows[:, None] * WORDS, bit[None, :], inside, WORDS, 1, BITS)


@triton.jit
def load_places(words, rows, at, inside, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Codes number `at` [BLOCK_K] of `rows` [BLOCK_N] with COUNT codes each, in any order, [BLOCK_N, BLOCK_K]."""
    WORDS: tl.constexpr = (COUNT * BITS + 31) // 32
    return _load_straddling(words + rows[:, None] * WORDS, at[None, :] * BITS, inside, WORDS, 1, BITS)


@triton.jit
def _load_straddling(words, bit, inside, WORDS: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr):
    """Codes that start at `bit` of a sequence of words; words follow each other at STRIDE."""
    word = bit // 32
    shift = bit % 32
    low = tl.load(words + word * STRIDE, mask=inside & (word < WORDS), other=0)
    codes = low.to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if 32 % BITS != 0:
        crosses = (shift + BITS > 32) & (word + 1 < WORDS)
        high = tl.load(words + (word + 1) * STRIDE, mask=inside & crosses, other=0)
        # Two shifts, because a shift by 32 is undefined and shift may be 0.
        codes = codes | (high.to(tl.uint32, bitcast=True) << 1) << (31 - shift).to(tl.uint32)
    return (codes & (1 << BITS) - 1).to(tl.int32)


@triton.jit
def load_zeros(zero, rows, group, inside, ROWS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Zero-points of (rows, group), which are broadcast; they are packed along the rows."""
    WORDS: tl.constexpr = (ROWS * BITS + 31) // 32
    return _load_straddling(zero + group, rows * BITS, inside, WORDS, GROUPS, BITS)


@triton.jit
def start_sum(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The accumulator to start from."""
    if BLOCK_M == 1:
        return tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)


@triton.jit
def add_product(total, x, start, M, weight, IN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """`total` plus x times the decoded tile weight [BLOCK_N, BLOCK_K] of columns start ...; x is 0 outside."""
    column = start + tl.arange(0, BLOCK_K)
    if BLOCK_M == 1:
        values = tl.load(x + tl.program_id(1) * IN + column, mask=column < IN, other=0.0).to(tl.float32)
        return total + weight * values[None, :]
    else:
        row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        tile = tl.load(
            x + row[:, None] * IN + column[None, :],
            mask=(row[:, None] < M) & (column[None, :] < IN),
            other=0.0,
        )
        if tile.dtype.primitive_bitwidth == 8:
            tile = tile.to(tl.float16)  # exact; float8 tensor cores would add up in 22 bits
        return tl.dot(tile, tl.trans(weight.to(tile.dtype)), total, input_precision="ieee")


@triton.jit
def finish_sum(total, BLOCK_M: tl.constexpr):
    """The sum as [BLOCK_M, BLOCK_N]."""
    if BLOCK_M == 1:
        return tl.sum(total, axis=1)[None, :]
    else:
        return total


@triton.jit
def store(y, result, rows, M, OUT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write result [BLOCK_M, BLOCK_N] to y [M, OUT]."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(
        y + row[:, None] * OUT + rows[None, :],
        result.to(y.dtype.element_ty),
        mask=(row[:, None] < M) & (rows[None, :] < OUT),
    )
