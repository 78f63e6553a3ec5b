"""What `kv_dequantize` is called with, and how it is checked."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from effbench.kernels._common.packing import pack
from effbench.kernels.kv_dequantize.reference import kv_dequantize
from effbench.kernels.kv_quantize.cases import OP as QUANTIZE
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Random codes, scales and least numbers."""
    shape = case["groups"], case["size"]
    codes = torch.randint(2 ** case["bits"], shape, device=device, generator=generator)
    scale, low = torch.rand(2, shape[0], 1, device=device, generator=generator).to(dtype)
    return {
        "words": pack(codes, case["bits"]),
        "scale": scale,
        "low": low - 0.5,
        "bits": case["bits"],
        "size": shape[1],
    }


def count_flops(
    words: Sequence[int], scale: Sequence[int], low: Sequence[int], bits: int, size: int, out_shape: Sequence[int]
) -> int:
    """A product and a sum a number."""
    return 2 * math.prod(out_shape)


OP = Op(
    name="kv_dequantize",
    reference=kv_dequantize,
    inputs=draw,
    flop_formula=count_flops,
    cases=[case for case in QUANTIZE.cases if not case["symmetric"]],
    timed=QUANTIZE.timed,
)
