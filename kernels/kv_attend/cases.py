"""What `kv_attend` is called with, and how it is checked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effbench.kernels._common.packing import word_count
from effbench.kernels._common.random import random_words
from effbench.kernels.kv_attend.reference import kv_attend
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Random codes, with scales and least numbers at which they are spread over [-2, 2], and random tails."""
    on: dict[str, Any] = {"device": device, "generator": generator}
    rows, width, unit, group = case["rows"], case["width"], case["unit"], case["group"]
    units, tail, values = case["units"], case["tail"], case["values"]

    def encoded(bits: int, size: int, *groups: int) -> tuple[Tensor, Tensor, Tensor]:
        low = -1 - torch.rand(*groups, 1, **on)
        return random_words(*groups, word_count(size, bits), **on), (-2 * low / 2**bits).to(dtype), low.to(dtype)

    keys = encoded(case["key_bits"], unit, rows, units, width)
    kept = encoded(case["value_bits"], group, rows, values, width // group)
    return {
        "query": torch.randn(rows, case["heads"], width, **on).to(dtype),
        **dict(zip(("key_words", "key_scale", "key_low"), keys, strict=True)),
        "key_tail": torch.randn(rows, tail, width, **on).to(dtype),
        **dict(zip(("value_words", "value_scale", "value_low"), kept, strict=True)),
        "value_tail": torch.randn(rows, units * unit + tail - values, width, **on).to(dtype),
        "key_bits": case["key_bits"],
        "value_bits": case["value_bits"],
        "unit": unit,
        "scaling": width**-0.5,
    }


def attention(
    rows: int,
    heads: int,
    width: int,
    units: int,
    tail: int,
    values: int,
    bits: tuple[int, int] = (4, 4),
    size: int = 32,
) -> Case:
    """Rows of grouped heads over so many units of keys and tokens behind them, and so many encoded values."""
    key_bits, value_bits = bits
    shape = dict(rows=rows, heads=heads, width=width, units=units, tail=tail, values=values)
    return dict(**shape, unit=size, group=size, key_bits=key_bits, value_bits=value_bits)


def count_flops(
    query: Sequence[int],
    key_words: Sequence[int],
    key_scale: Sequence[int],
    key_low: Sequence[int],
    key_tail: Sequence[int],
    value_words: Sequence[int],
    value_scale: Sequence[int],
    value_low: Sequence[int],
    value_tail: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Two products of every head with every token."""
    rows, heads, width = query
    return 4 * rows * heads * width * (value_words[1] + value_tail[1])


OP = Op(
    name="kv_attend",
    reference=kv_attend,
    inputs=draw,
    cases=[
        *(attention(3, 4, 64, 2, 9, 41, (bits, bits)) for bits in (2, 4, 8)),
        attention(2, 1, 32, 3, 0, 96, (2, 4)),  # no tail
        attention(1, 4, 64, 4, 0, 100),  # a tail of values alone
        attention(2, 3, 96, 0, 17, 0),  # nothing is encoded yet
        attention(2, 2, 64, 0, 40, 8, (8, 2)),  # values are, keys are not
        attention(5, 2, 48, 3, 5, 20, (4, 8), 8),
        attention(1, 8, 128, 8, 100, 256, (2, 2)),
        attention(1, 2, 32, 135, 60, 4200),  # many parts, where tokens are shared
    ],
    backends={"triton": "effbench.kernels.kv_attend.triton:kv_attend"},
    outputs=("out", "log_sum"),
    flop_formula=count_flops,
    timed=[
        attention(rows, heads, width, tokens // 32 - 2, 64, tokens - 128, (bits, bits))
        for rows, heads, width, tokens in ((8, 4, 64, 512), (64, 4, 128, 4096), (256, 4, 128, 32768))
        for bits in (2, 4)
    ],
)
