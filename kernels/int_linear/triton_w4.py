"""`int_linear` of 4-bit weights for few rows of x: on tensor cores, two weights per instruction, split along the input.

What is computed, for row m of x, output o, and groups g of inputs k:

    y[m, o] = sum over g of scale[o, g] * sum over k in g of (code[o, k] - zero[o, g]) * x[m, k]          (1)

Operands. The matrix is the tall operand of the tensor cores' product and x the narrow one, which comes in columns of 8:
a batch of one is filled up to 8 columns, which is little beside reading the matrix.

Decoding. A word holds the codes k = 0 ... 7 from its low bits up. Shifted right by 4j and masked by 0x000f000f it shows
the codes j and j + 4 in its two halves. A float16 with the bits 0x6400 is 1024, and its last bit is worth 1 (bfloat16:
0x4300 is 128), so a code in the lowest bits of those makes 1024 + code (Kim et al., 2022, arXiv:2211.10017). Adding
-(1024 + zero) is exact, and one instruction does it for both halves. The inner sum of (1) is then a product of 16 bits
with float32 sums, and its scale is applied once per group.

Order. Nothing is packed anew: a product may add up its inputs in any order if both operands agree on it. The order here
is the one in which a lane of the tensor cores multiplies the words that it has loaded 16 bytes at a time.

Groups. Where a tile of inputs has several groups, each gets columns of its own, in which x is zero for all other
groups.

Splits. With few outputs there are too few programs to keep a GPU busy, so the inputs of an output are split among
several programs, whose sums a second kernel adds up.

So far the arithmetic has run in the interpreter only, the inline PTX has been compiled only, and tile sizes and splits
follow from instruction and register counts, not from times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import covering_power, flatten_rows, largest_power, launch, make_contiguous
from effbench.kernels._common.tiles import load_zeros
from effbench.kernels.int_linear.reference import IntMatrix
from effbench.ops import Declined

BATCH = 64  # the most rows of x that are taken
BLOCK_K = 128
STAGES = 3  # tiles of x and of the matrix in use or on their way


# Bits 0-3 and 16-19 of a word ($1) become two floats, to which the two in $2 are added. One `lop3` masks and sets bits,
# one `add` adds both halves; Triton's own operations would take two instructions for the bits and a sum for each half.
# bfloat16 multiplies by one and adds, because its plain sum needs sm_90.
_ADD_FP16 = tl.constexpr("{.reg .b32 t; lop3.b32 t, $1, 0x000f000f, 0x64006400, 0xea; add.f16x2 $0, t, $2;}")
_ADD_BF16 = tl.constexpr(
    "{.reg .b32 t, one; mov.b32 one, 0x3f803f80; lop3.b32 t, $1, 0x000f000f, 0x43004300, 0xea;"
    " fma.rn.bf16x2 $0, t, one, $2;}"
)


@triton.jit
def _low_half(words, half: tl.constexpr):
    """The low 16 bits as a float."""
    return words.to(tl.int16).to(half, bitcast=True)


@triton.jit
def _decode(words, zero, half: tl.constexpr, PTX: tl.constexpr):
    """The codes in bits 0-3 and 16-19 of `words` minus `zero`, exactly, as floats of type `half` [..., 2]."""
    # Both halves of `minus` hold 0xe400 + zero, which is -(1024 + zero) in float16, or 0xc300 + zero, which is
    # -(128 + zero) in bfloat16: zero goes to both by the factor 0x10001, the constant is subtracted modulo 2^32.
    minus = zero * 0x10001 - (0x1BFF1C00 if half == tl.float16 else 0x3CFF3D00)
    if PTX:
        asm: tl.constexpr = _ADD_FP16 if half == tl.float16 else _ADD_BF16
        pair = tl.inline_asm_elementwise(asm, "=r,r,r", [words, minus], dtype=tl.int32, is_pure=True, pack=1)
        return tl.join(_low_half(pair, half), _low_half(pair >> 16, half))
    else:
        pair = words & 0x000F000F | (0x64006400 if half == tl.float16 else 0x43004300)
        offset = _low_half(minus, half)
        return tl.join(_low_half(pair, half) + offset, _low_half(pair >> 16, half) + offset)


@triton.jit
def _w4_linear(
    x,
    weight,
    scale,
    zero,
    y,  # [splits, M, OUT]
    M,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,  # of a tile along the input, each within one group
    SPAN: tl.constexpr,  # parts of a group
    TILES: tl.constexpr,  # along the input, of one program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
):
    WORDS: tl.constexpr = (IN + 7) // 8
    QUAD: tl.constexpr = BLOCK_K // 32  # words of a row for each of the four lanes that share it
    WHOLE: tl.constexpr = IN % (BLOCK_K * TILES) == 0  # no tile reaches beyond the last input

    # 1. What this program computes: BLOCK_N rows of the matrix (axis 0 of the grid) times BLOCK_M rows of x (axis 2),
    #    over TILES tiles of inputs (axis 1). Column c of the product is row c // PARTS of x, in part c % PARTS of a
    #    tile; `taken` leaves x zero where an input belongs to another part, so that every column sums over one group.
    column = tl.arange(0, BLOCK_M * PARTS)
    sample = tl.program_id(2) * BLOCK_M + column // PARTS
    k = tl.arange(0, BLOCK_K)
    taken = (sample < M)[:, None] & (column[:, None] % PARTS == k[None, :] // (BLOCK_K // PARTS))

    # 2. The rows in two orders: `rows` as the product has them, `tall` as they are loaded. Loads spread the warps over
    #    rows in steps of 8, tensor cores in steps of 16; so a warp loads the rows that it will multiply.
    n = tl.arange(0, BLOCK_N)
    rows = tl.program_id(0) * BLOCK_N + n
    inside = (rows < OUT) | (OUT % BLOCK_N == 0)
    tall = n // (16 * WARPS) * (16 * WARPS) + n // 8 % WARPS * 16 + n // (8 * WARPS) % 2 * 8 + n % 8
    tall += tl.program_id(0) * BLOCK_N
    within = (tall < OUT) | (OUT % BLOCK_N == 0)
    part = tl.arange(0, PARTS)
    steps = scale + rows[:, None] * GROUPS
    first = tl.program_id(1) * TILES

    # 3. The scales of the first tile, [BLOCK_N, PARTS].
    group = (first * PARTS + part) // SPAN
    step = tl.load(steps + group[None, :], mask=inside[:, None] & (group < GROUPS)[None, :], other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_M, PARTS), dtype=tl.float32)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        # 4. Load a tile of the matrix and of x, and the scales of the next tile: the compiler loads ahead by itself,
        #    but not what has two bytes.
        at = first + tile
        word = at * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
        words = tl.load(
            weight + tall[:, None] * WORDS + word[None, :],
            mask=within[:, None] & ((word < WORDS) | WHOLE)[None, :],
            other=0,
            eviction_policy="evict_first",  # Triton 3.7 does not yet tell it to asynchronous copies
        )
        start = at * BLOCK_K
        values = tl.load(
            x + sample[:, None] * IN + start + k[None, :],
            mask=taken & ((start + k < IN) | WHOLE)[None, :],
            other=0.0,
        )
        group = ((at + 1) * PARTS + part) // SPAN
        ahead = tl.load(steps + group[None, :], mask=inside[:, None] & (group < GROUPS)[None, :], other=0.0)
        # 5. The zero-point of every row and part: 8 where none is stored. 4 // PARTS of a row's four lanes are in each
        #    part.
        if zero is None:
            middle = tl.full((BLOCK_N, PARTS), 8, dtype=tl.int32)
        else:
            own = (at * PARTS + part) // SPAN
            known = within[:, None] & (own < GROUPS)[None, :]
            middle = load_zeros(zero, tall[:, None], own[None, :], known, OUT, GROUPS, 4)
        middle = tl.broadcast_to(middle[:, :, None], (BLOCK_N, PARTS, 4 // PARTS))
        middle = tl.reshape(middle, (BLOCK_N, 4, 1, 1))
        # 6. Decode: four shifts of a word, two codes each, [BLOCK_N, lane, word, shift j, code j or j + 4], minus zero.
        shifted = tl.reshape(words, (BLOCK_N, 4, QUAD, 1)) >> (tl.arange(0, 4) * 4)[None, None, None, :]
        decoded = _decode(shifted, middle, x.dtype.element_ty, PTX)
        # 7. Put both operands in the order of the tensor cores' lanes, so that nothing moves between lanes. Axes: 16
        #    WARPS rows, half of 16 rows, warp, 8 rows, lane, its word, shift j (j // 2, j % 2), half of the word.
        decoded = tl.reshape(decoded, (BLOCK_N // (16 * WARPS), 2, WARPS, 8, 4, QUAD, 2, 2, 2))
        values = tl.reshape(values, (BLOCK_M * PARTS, 4, QUAD, 2, 2, 2))
        if WARPS < 4:  # mma: a lane has four neighbours along the input
            decoded = tl.permute(decoded, (0, 2, 1, 3, 5, 6, 4, 7, 8))
            values = tl.permute(values, (2, 4, 1, 5, 3, 0))
        else:  # wgmma: two
            decoded = tl.permute(decoded, (0, 2, 1, 3, 5, 6, 7, 4, 8))
            values = tl.permute(values, (2, 4, 5, 1, 3, 0))
        # 8. The inner sums of (1), in float32; times the scale of their group, added up over the tiles.
        product = tl.dot(
            tl.reshape(decoded, (BLOCK_N, BLOCK_K)),
            tl.reshape(values, (BLOCK_K, BLOCK_M * PARTS)),
        )
        total += tl.reshape(product, (BLOCK_N, BLOCK_M, PARTS)) * step.to(tl.float32)[:, None, :]
        step = ahead
    # 9. Add up the parts and store, as a part of the result where the inputs are split.
    result = tl.sum(total, axis=2)
    sample = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(
        y + (tl.program_id(1) * M + sample[None, :]) * OUT + rows[:, None],
        result.to(y.dtype.element_ty),
        mask=(sample < M)[None, :] & inside[:, None],
    )


@triton.jit
def _sum_splits(partial, y, SIZE, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y [SIZE] = the sum of partial [SPLITS, SIZE], always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < SIZE)


def int_linear(x: Tensor, matrix: IntMatrix, ptx: bool = not triton.knobs.runtime.interpret) -> Tensor:
    """See `IntMatrix`; Declined but for 4 bits, 1 to 64 rows of x in 16 bits, and scales of rows and groups.

    A group is the whole row or a multiple of 32 consecutive inputs, of which the last may have fewer. `ptx=False`
    decodes without inline PTX, which the interpreter does not know.
    """
    weight, scale, zero, g_idx, bits, group_size = matrix
    flat = flatten_rows(x)
    batch, in_features = flat.shape
    out_features, groups = len(weight), scale.shape[1]
    if bits != 4 or x.dtype not in (torch.bfloat16, torch.float16) or scale.dtype != torch.float16:
        raise Declined("needs 4 bits, 16-bit x and float16 scales")
    if not 0 < batch <= BATCH:
        raise Declined(f"needs 1 to {BATCH} rows of x")
    size = group_size or in_features
    unit = BLOCK_K if groups == 1 else largest_power(size, BLOCK_K)
    if g_idx is not None or len(scale) != out_features or unit < 32:
        raise Declined("needs scales per row and group of a multiple of 32 consecutive inputs")

    # Sizes of a program: warps work alone (1 or 2 of them) as long as their registers hold the sums.
    parts = BLOCK_K // unit
    block_m = min(covering_power(batch), BATCH // parts)
    columns = block_m * parts
    block_n, warps, enough = (32, 1, 1320) if columns <= 8 else (64, 2, 460) if columns <= 32 else (128, 4, 220)
    across, down, tiles = -(-out_features // block_n), -(-batch // block_m), -(-in_features // BLOCK_K)
    # Split the input until there are programs enough for 132 multiprocessors to overlap their loads and to end
    # together, but not below four tiles for each.
    ways = covering_power(-(-enough // (across * down)))
    per_program = max(-(-tiles // ways), min(tiles, 4))
    splits = -(-tiles // per_program)

    y = torch.empty(batch, out_features, dtype=x.dtype, device=x.device)
    sums = y if splits == 1 else torch.empty(splits, batch, out_features, dtype=torch.float32, device=x.device)
    launch(
        _w4_linear,
        (across, splits, down),
        flat,
        *make_contiguous(weight, scale, zero),
        sums,
        batch,
        IN=in_features,
        OUT=out_features,
        GROUPS=groups,
        PARTS=parts,
        SPAN=-(-size // unit),
        TILES=per_program,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        WARPS=warps,
        STAGES=STAGES,
        PTX=ptx,
        numbers=block_n * BLOCK_K,
        num_warps=warps,
    )
    if splits > 1:
        launch(
            _sum_splits, (-(-y.numel() // 128),), sums, y, y.numel(), SPLITS=splits, BLOCK=128, numbers=128, num_warps=1
        )
    return y.view(*x.shape[:-1], out_features)
