"""What `fp8_product` is called with, and how it is checked."""

from collections.abc import Sequence
from typing import Any

import torch

from effbench.kernels.fp8_product.reference import fp8_product
from effbench.kernels.fp8_quantize.reference import fp8_quantize
from effbench.ops import Case, Op


def draw(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Two matrices of normal numbers, as `fp8_quantize` gives them."""
    drawn: dict[str, Any] = {}
    for name, rows, gradients in (("a", case["m"], case["gradients"]), ("b", case["n"], False)):
        x = torch.randn(rows, case["k"], device=device, generator=generator)
        drawn[f"scale_{name}"] = torch.tensor(5000.0 if gradients else 100.0, device=device)
        drawn[name], *_ = fp8_quantize(x, drawn[f"scale_{name}"], gradients)
    names = ("a", "b", "scale_a", "scale_b")
    return {name: drawn[name] for name in names} | {"gradients": case["gradients"]}


def count_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """A product and a sum for each number of one row and one column."""
    return 2 * a[0] * a[1] * b[0]


OP = Op(
    name="fp8_product",
    reference=fp8_product,
    inputs=draw,
    flop_formula=count_flops,
    backends={"scaled_mm": "effbench.kernels.fp8_product.scaled_mm:fp8_product"},
    cases=[
        dict(m=m, k=k, n=n, gradients=gradients)
        for m, k, n in ((16, 32, 48), (1, 17, 5), (33, 128, 64))
        for gradients in (False, True)
    ],
    timed=[dict(m=m, k=k, n=n, gradients=False) for m, k, n in ((64, 64, 64), (8192, 4096, 14336))],
)
