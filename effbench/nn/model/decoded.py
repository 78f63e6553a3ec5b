"""Packed linears decoded once, for as long as a model is only scored on a processor.

The reference of every format decodes its matrix in each call. Where nothing but predictions is asked for, a decoded
copy gives the same ones and saves that; what is measured of time and memory never sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor, nn

from effbench.nn.model.linear import Replaced, replace
from effbench.ops import multiply

SHARE = 0.5  # of the memory that is free, at most


class Decoded(nn.Module):
    """y = x W^T + b with a matrix float32 [out, in], computed as the reference of an op computes it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@contextlib.contextmanager
def decoded(model: nn.Module) -> Iterator[bool]:
    """Within it the model's packed linears compute with decoded matrices; whether any does.

    All stay packed on a GPU, and where the copies would take more than half of the memory that is free.
    """
    packed = {path: module for path, module in model.named_modules() if isinstance(module, Replaced) and module.decodes}
    numbers = sum(module.in_features * module.out_features for module in packed.values())
    on_processor = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if not (packed and on_processor and 4 * numbers <= SHARE * psutil.virtual_memory().available):
        yield False
        return
    try:
        for path, module in packed.items():
            with torch.no_grad():
                replace(model, path, Decoded(module.dense_weight(), module.bias))
        yield True
    finally:
        for path, module in packed.items():
            replace(model, path, module)
