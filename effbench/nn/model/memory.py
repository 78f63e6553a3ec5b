"""Tokens that are added to a model to hold memory: embeddings that are trained, and ids that no vocabulary has.

The id V + i stands for row i, where V is the number of rows of the model's own table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.nn.model.linear import Added

MEMORY = "memory"  # name of the module in the model


class MemoryTokens(Added):
    """Embeddings [length, width]; a child of the model."""

    undecayed = ("rows",)

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(length, width, dtype=torch.float32))

    def config(self) -> dict[str, Any]:
        length, width = self.rows.shape
        return {"length": length, "width": width}


def find_memory(model: nn.Module) -> MemoryTokens:
    """The memory tokens of a model. Raises `Unsupported` where it has none."""
    found = getattr(model, MEMORY, None)
    if not isinstance(found, MemoryTokens):
        raise Unsupported("the model has no memory tokens: a step has taken them away")
    return found


def count_vocabulary(model: Any) -> int:
    """V: the first id that stands for a memory token."""
    return int(model.get_input_embeddings().weight.shape[0])


def embed(model: Any, ids: Tensor) -> Tensor:
    """[B, T, H] embeddings of ids [B, T], those of memory tokens among them."""
    first, rows = count_vocabulary(model), find_memory(model).rows
    own = model.get_input_embeddings()(ids.clamp(max=first - 1))
    return torch.where((ids >= first)[..., None], rows[(ids - first).clamp(min=0)].to(own.dtype), own)
