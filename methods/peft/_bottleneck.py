"""A narrow MLP beside or behind what stands still: what the adapters of Houlsby and of He share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from effbench.nn.precision import widen


class Bottleneck(nn.Module):
    """f(x W_down + b_down) W_up + b_up, in float32; weights are for the method to draw, biases start at zero."""

    def __init__(self, hidden: int, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width, dtype=torch.float32)
        self.up = nn.Linear(width, hidden, dtype=torch.float32)
        self.activation = activation
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(widen(x))))
