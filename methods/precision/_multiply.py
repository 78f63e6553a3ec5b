"""What precisions of float32 products share: the one switch of the process, for forward and backward passes alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

from effbench.core.run import Run
from effbench.nn.train.groups import widen


@contextlib.contextmanager
def multiplying(run: Run, precision: Literal["highest", "high"]) -> Iterator[None]:
    """Have the whole model in float32 inside, and products of float32 numbers as precise as this says."""
    before = torch.get_float32_matmul_precision()
    with widen(run.model.parameters()):
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
