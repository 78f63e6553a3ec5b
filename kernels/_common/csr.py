"""Compressed sparse rows, of numbers or of blocks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def positions(crow: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every stored entry, int64 [n] each."""
    rows = torch.arange(len(crow) - 1, device=crow.device)
    return rows.repeat_interleave(crow.diff(), output_size=len(col)), col.long()


def random_positions(case: Mapping[str, Any], rows: int, columns: int, on: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Random crow and col of `number` entries.

    `uneven`: every third row is empty, the others differ in length; `wide`: columns are int32 instead of int16.
    """
    score = torch.rand(rows, columns, **on)
    if case.get("uneven"):
        score *= torch.arange(rows, device=score.device)[:, None] % 3
    entry = score.flatten().topk(case["number"]).indices.sort().values
    crow = torch.searchsorted(entry, torch.arange(rows + 1, device=score.device) * columns, out_int32=True)
    return crow, (entry % columns).to(torch.int32 if case.get("wide") else torch.int16)
