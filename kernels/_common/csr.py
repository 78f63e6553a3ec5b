"""Compressed sparse rows, of numbers or of blocks."""

import torch
from torch import Tensor


def positions(crow: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every stored entry, int64 [n] each."""
    rows = torch.arange(len(crow) - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff(), output_size=len(col)), col.long()
