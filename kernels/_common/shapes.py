"""The sizes that linear ops are timed at: those of public models, and one that suits a processor."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effbench.ops import Case, linear_case

SMALL = (512, 1024)  # inputs and outputs
LARGE = ((8192, 28672), (8192, 8192))
LINEARS = (*LARGE, (14336, 4096), (4096, 4096))


def size_cases(
    fields: Callable[[int, int], Mapping[str, Any]],
    shapes: Sequence[tuple[int, int]] = LARGE,
    batches: Sequence[int] = (1, 16),
) -> list[Case]:
    """Cases of an op at these sizes, the small one first; `fields(inputs, outputs)` is what else they have."""
    return [
        linear_case(batch, inputs, outputs, **fields(inputs, outputs))
        for inputs, outputs in (SMALL, *shapes)
        for batch in batches
    ]
