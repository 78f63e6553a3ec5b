"""`kv_attend` in Triton: a program for each row, or several that share its tokens, and tokens a block at a time.

Keys and values have the same form if keys are looked at as [D, T] and values as [T, D]: words and groups along the
columns. They are decoded in float32 and rounded to the type of the query, as the reference does, for the tensor cores;
the heads of a row are filled up to the 16 rows that these multiply. Softmax and sums are in float32. So far the kernel
has run in the interpreter only; sizes and splits were chosen by the code the compiler makes of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbench.kernels._common.launch import covering_power, launch, make_contiguous
from effbench.ops import Declined

BLOCK_H = 16  # rows that tensor cores multiply
PROGRAMS = 528  # four for each of 132 multiprocessors, to overlap their loads
LEAST = 4  # blocks of tokens of a program


@triton.jit
def _decode(words, scale, low, word, group, inside, dtype, BITS: tl.constexpr, EACH: tl.constexpr):
    """[R, W * EACH] of words at `word` [R, W], of EACH codes, and scale and least number of each at `group`; else 0."""
    packed = tl.load(words + word, mask=inside, other=0)
    step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    least = tl.load(low + group, mask=inside, other=0.0).to(tl.float32)
    shift = tl.arange(0, EACH) * BITS
    codes = packed[:, :, None] >> shift[None, None, :] & (1 << BITS) - 1
    decoded = codes.to(tl.float32) * step[:, :, None] + least[:, :, None]
    return tl.reshape(decoded.to(dtype), (word.shape[0], word.shape[1] * EACH))


@triton.jit
def _kv_attend(
    query,
    key_words,
    key_scale,
    key_low,
    key_tail,
    value_words,
    value_scale,
    value_low,
    value_tail,
    out,  # [splits, rows, HEADS, WIDTH]
    log_sum,  # [splits, rows, HEADS]
    units,
    tail,
    values,  # that are encoded
    scaling,
    blocks,  # of tokens, for each program
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,  # channels of a group of values
    KEY_EACH: tl.constexpr,  # codes in a word
    VALUE_EACH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dtype = query.dtype.element_ty
    head, channel = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    is_head, is_channel = head[:, None] < HEADS, channel < WIDTH
    q = tl.load(
        query + (row * HEADS + head[:, None]) * WIDTH + channel[None, :], mask=is_head & is_channel[None, :], other=0.0
    )
    # A block has words along the tokens of keys and along the channels of values.
    UNIT_WORDS: tl.constexpr = UNIT // KEY_EACH
    GROUP_WORDS: tl.constexpr = SIZE // VALUE_EACH
    GROUPS: tl.constexpr = WIDTH // SIZE
    WORDS: tl.constexpr = GROUPS * GROUP_WORDS
    value_word = tl.arange(0, BLOCK_D // VALUE_EACH)[None, :]
    encoded = units * UNIT
    tokens = encoded + tail
    key_words += row * units * WIDTH * UNIT_WORDS
    key_scale += row * units * WIDTH
    key_low += row * units * WIDTH
    key_tail += row * tail * WIDTH
    value_words += row * values * WORDS
    value_scale += row * values * GROUPS
    value_low += row * values * GROUPS
    value_tail += row * (tokens - values) * WIDTH

    largest = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    result = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    first = tl.program_id(1) * blocks * BLOCK_T
    for start in range(first, min(first + blocks * BLOCK_T, tokens), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        # 1. Scores, by keys [D, T]. A block at the end of the units has keys of both kinds, of which each is 0 where
        #    the other is; so with values.
        scores = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
        if start < encoded:
            word = (start // KEY_EACH + tl.arange(0, BLOCK_T // KEY_EACH))[None, :]
            group = word // UNIT_WORDS * WIDTH + channel[:, None]
            keys = _decode(
                key_words,
                key_scale,
                key_low,
                group * UNIT_WORDS + word % UNIT_WORDS,
                group,
                is_channel[:, None] & (word < units * UNIT_WORDS),
                dtype,
                KEY_BITS,
                KEY_EACH,
            )
            scores = tl.dot(q, keys, scores, input_precision="tf32x3")
        if start + BLOCK_T > encoded:
            keys = tl.load(
                key_tail + (token - encoded)[None, :] * WIDTH + channel[:, None],
                mask=is_channel[:, None] & ((token >= encoded) & (token < tokens))[None, :],
                other=0.0,
            )
            scores = tl.dot(q, keys.to(dtype), scores, input_precision="tf32x3")
        # 2. Weights, and how much less what was summed so far weighs.
        scores = tl.where((token < tokens)[None, :], scores * scaling, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - larger[:, None])
        less = tl.exp(largest - larger)
        total = total * less + tl.sum(weights, axis=1)
        largest = larger
        # 3. The sum of values [T, D].
        result *= less[:, None]
        if start < values:
            kept = _decode(
                value_words,
                value_scale,
                value_low,
                token[:, None] * WORDS + value_word,
                token[:, None] * GROUPS + value_word // GROUP_WORDS,
                (token < values)[:, None] & (value_word < WORDS),
                dtype,
                VALUE_BITS,
                VALUE_EACH,
            )
            result = tl.dot(weights.to(dtype), kept, result, input_precision="tf32x3")
        if start + BLOCK_T > values:
            kept = tl.load(
                value_tail + (token - values)[:, None] * WIDTH + channel[None, :],
                mask=((token >= values) & (token < tokens))[:, None] & is_channel[None, :],
                other=0.0,
            )
            result = tl.dot(weights.to(dtype), kept.to(dtype), result, input_precision="tf32x3")
    at = (tl.program_id(1) * tl.num_programs(0) + row) * HEADS + head
    tl.store(
        out + at[:, None] * WIDTH + channel[None, :],
        (result / total[:, None]).to(out.dtype.element_ty),
        mask=is_head & is_channel[None, :],
    )
    tl.store(log_sum + at, largest + tl.log(total), mask=head < HEADS)


@triton.jit
def _merge(
    parts,  # [SPLITS, heads, WIDTH]
    logs,  # [SPLITS, heads]
    out,
    log_sum,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STEP: tl.constexpr,  # parts at a time
    BLOCK_D: tl.constexpr,
):
    """Parts weighed by the softmax of their logarithms; a program for each head."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    channel, every = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    log = tl.load(logs + every * heads + head, mask=every < SPLITS, other=-float("inf"))
    largest = tl.max(log, axis=0)
    whole = largest + tl.log(tl.sum(tl.exp(log - largest), axis=0))
    result = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, SPLITS, STEP):
        split = start + tl.arange(0, STEP)
        at = split * heads + head
        weight = tl.exp(tl.load(logs + at, mask=split < SPLITS, other=-float("inf")) - whole)
        inside = (split < SPLITS)[:, None] & (channel < WIDTH)[None, :]
        part = tl.load(parts + at[:, None] * WIDTH + channel[None, :], mask=inside, other=0.0)
        result += tl.sum(part * weight[:, None], axis=0)
    tl.store(out + head * WIDTH + channel, result.to(out.dtype.element_ty), mask=channel < WIDTH)
    tl.store(log_sum + head, whole)


def kv_attend(
    query: Tensor,
    key_words: Tensor,
    key_scale: Tensor,
    key_low: Tensor,
    key_tail: Tensor,
    value_words: Tensor,
    value_scale: Tensor,
    value_low: Tensor,
    value_tail: Tensor,
    key_bits: int,
    value_bits: int,
    unit: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.kv_attend`; Declined for float64, units and groups of no power of two, and heads that are
    many (over 16) or wide (over 256 channels in 16 bits, over 128 in float32)."""
    rows, heads, width = query.shape
    units, tail, values = key_words.shape[1], key_tail.shape[1], value_words.shape[1]
    size = width // value_words.shape[2]
    block_d = max(16, covering_power(width))
    block_t = min(128 // query.element_size(), 4096 // block_d)  # what fits into registers
    if query.dtype == torch.float64:
        raise Declined("sums are in float32")
    if unit != covering_power(unit) or size != covering_power(size):
        raise Declined(f"units of {unit} tokens and groups of {size} channels do not divide a block")
    if heads > BLOCK_H or block_d * query.element_size() > 512:
        raise Declined(f"{heads} heads of {width} channels do not fit")
    blocks = -(-(units * unit + tail) // block_t)
    # Share the tokens of a row until there are programs enough, but not below a few blocks for each.
    per_program = max(-(-blocks // -(-PROGRAMS // max(1, rows))), min(blocks, LEAST))
    splits = -(-blocks // per_program)

    out, log_sum = query.new_empty(query.shape), query.new_empty(rows, heads, dtype=torch.float32)
    parts, logs = out, log_sum
    if splits > 1:
        parts, logs = (whole.new_empty(splits, *whole.shape, dtype=torch.float32) for whole in (out, log_sum))
    arguments = (query, key_words, key_scale, key_low, key_tail, value_words, value_scale, value_low, value_tail)
    launch(
        _kv_attend,
        (rows, splits),
        *make_contiguous(*arguments),
        parts,
        logs,
        units,
        tail,
        values,
        scaling,
        per_program,
        HEADS=heads,
        WIDTH=width,
        KEY_BITS=key_bits,
        VALUE_BITS=value_bits,
        UNIT=unit,
        SIZE=size,
        KEY_EACH=min(32 // key_bits, unit),
        VALUE_EACH=min(32 // value_bits, size),
        BLOCK_H=BLOCK_H,
        BLOCK_D=block_d,
        BLOCK_T=block_t,
        numbers=2 * block_t * width,
        num_warps=8 if query.element_size() == 4 and block_d > 64 else 4,
    )
    if splits > 1:
        launch(
            _merge,
            (rows * heads,),
            parts,
            logs,
            out,
            log_sum,
            SPLITS=splits,
            WIDTH=width,
            BLOCK_S=covering_power(splits),
            STEP=16,
            BLOCK_D=block_d,
            numbers=16 * width,
            num_warps=4,
        )
    return out, log_sum
