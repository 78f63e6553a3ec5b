"""Examples as tensors: one a row and padded, or packed, several in a row that do not see each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effbench.core.views import Example

IGNORED = -100  # label of a token that is not learned

Batch = dict[str, Tensor]


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> Batch:
    """One example a row, padded on the right; prompts, first tokens and padding are not learned.

    `input_ids`, `attention_mask`, `labels` [B, T], and `example` [B, T], the place of each token's example, -1 for
    padding; `weight` [B, T], how much each token counts, where not all examples count alike.
    """
    return _lay([[place] for place in range(len(examples))], examples, pad, device)


def pack(examples: Sequence[Example], width: int, pad: int, device: torch.device) -> Batch:
    """Examples of at most `width` tokens in few rows of at most as many, none of which sees another.

    As `collate`, but `attention_mask` is bool [B, 1, T, T], True where a query may look, and `position_ids` [B, T]
    begin anew with each example.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(examples)), key=lambda i: -len(examples[i].ids)):  # the longest first, first fit
        length = len(examples[place].ids)
        row = next((i for i, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(width)
        rows[row].append(place)
        room[row] -= length
    batch = _lay(rows, examples, pad, device)
    example = batch["example"]
    same = (example[:, :, None] == example[:, None, :]) & (example >= 0)[:, :, None]
    causal = torch.ones(same.shape[1:], dtype=torch.bool, device=device).tril()
    # A query that sees nothing gets NaN from some kernels: padding looks at itself.
    alone = torch.eye(same.shape[1], dtype=torch.bool, device=device)
    batch["attention_mask"] = (same & causal | alone)[:, None]
    positions = [[i for place in row for i in range(len(examples[place].ids))] for row in rows]
    batch["position_ids"] = _fill(positions, 0, example.shape[1], device)
    return batch


def _lay(rows: Sequence[Sequence[int]], examples: Sequence[Example], pad: int, device: torch.device) -> Batch:
    """The examples at these places, row by row."""
    ids = [[token for place in row for token in examples[place].ids] for row in rows]
    owner = [[place for place in row for _ in examples[place].ids] for row in rows]
    labels = [[label for place in row for label in _label(examples[place])] for row in rows]
    width = max(map(len, ids))
    example = _fill(owner, -1, width, device)
    batch = {
        "input_ids": _fill(ids, pad, width, device),
        "attention_mask": (example >= 0).long(),
        "labels": _fill(labels, IGNORED, width, device),
        "example": example,
    }
    if any(one.weight != 1 for one in examples):
        weights = torch.tensor([*(one.weight for one in examples), 0.0], device=device)
        batch["weight"] = weights[example]  # the last for padding, which is at -1
    return batch


def _label(example: Example) -> list[int]:
    """What is learned of an example; nothing predicts its first token."""
    first = max(1, example.prompt)
    return [IGNORED] * first + list(example.ids[first:])


def _fill(rows: Sequence[Sequence[int]], value: int, width: int, device: torch.device) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)
