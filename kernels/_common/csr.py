"""Compressed sparse rows, of numbers or of blocks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def positions(crow: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every stored entry, int64 [n] each."""
    rows = torch.arange(len(crow) - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff(), output_size=len(col)), col.long()


def random_entries(case: Mapping[str, Any], rows: int, columns: int, on: dict[str, Any]) -> Tensor:
    """Ascending flat places of `number` random entries, int64 [number].

    `uneven`: every third row is empty, the others differ in length.
    """
    score = torch.rand(rows, columns, **on)
    if case.get("uneven"):
        score *= torch.arange(rows, device=score.device)[:, None] % 3
    return score.flatten().topk(case["number"]).indices.sort().values


def row_starts(entries: Tensor, rows: int, columns: int) -> Tensor:
    """crow of ascending flat places, int32 [rows + 1]."""
    return torch.searchsorted(entries, torch.arange(rows + 1, device=entries.device) * columns, out_int32=True)


def random_positions(case: Mapping[str, Any], rows: int, columns: int, on: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Crow and col of `random_entries`; `wide`: columns are int32 instead of int16."""
    entries = random_entries(case, rows, columns, on)
    col = (entries % columns).to(torch.int32 if case.get("wide") else torch.int16)
    return row_starts(entries, rows, columns), col
