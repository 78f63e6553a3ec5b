"""Keys or values as a cache holds them: rows of tokens in their order, the oldest in the form of an encoder.

A row is one sequence and one head. Rows are independent: they may hold unlike numbers of tokens, and what one of them
holds does not depend on how the others are padded. Numbers per row are an `int` where all rows are alike, else a
tensor [N].
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from effbench.core.views import Codec

Count = int | Tensor  # of each row


@dataclasses.dataclass
class Store:
    """What is held of N rows: first encoded units, then a tail of tokens as they came."""

    codec: Codec | None
    tail: Tensor  # [N, L, D], of each row the first `tails`
    tails: Count
    codes: tuple[Tensor, ...] = ()  # each [N, K, ...], of each row the first `units`
    units: Count = 0

    @property
    def unit(self) -> int:
        """Tokens that are encoded together, and so go together."""
        return 1 if self.codec is None else self.codec.unit

    @property
    def lengths(self) -> Count:
        """Tokens held in each row."""
        return self.units * self.unit + self.tails

    def append(self, new: Tensor, real: Tensor | None) -> None:
        """Put tokens [N, T, D] behind those of each row, of all of them or of those that are `real` [N, T]."""
        if real is None and isinstance(self.tails, int):
            self.tail = torch.cat([self.tail, new], 1)
            self.tails += new.shape[1]
        else:
            self.tail, self.tails = place(self.tail, self.tails, new, real)

    def flush(self) -> bool:
        """Encode what is due of each tail, and say whether anything was."""
        if self.codec is None:
            return False
        unit, chunk = self.codec.unit, self.codec.flush
        if isinstance(self.tails, int):
            due: Count = max(0, self.tails - self.codec.retain) // chunk * chunk
            most = int(due)
        else:
            due = (self.tails - self.codec.retain).clamp(min=0) // chunk * chunk
            most = int(due.max())
        if not most:
            return False
        fresh = self.codec.encode(self.tail[:, :most].unflatten(1, (-1, unit)))
        if isinstance(due, int) and isinstance(self.units, int):
            held = self.codes or tuple(part[:, :0] for part in fresh)
            self.codes = tuple(torch.cat(pair, 1) for pair in zip(held, fresh, strict=True))
            self.tail = self.tail[:, due:].clone()  # a view would hold all that was encoded
            self.units += due // unit
            self.tails -= due
            return True
        real = torch.arange(most // unit, device=self.tail.device) < _column(due // unit, self.tail)
        real = real.expand(len(self.tail), -1)
        held, before = self.codes or tuple(part[:, :0] for part in fresh), self.units
        grown = [place(old, before, new, real) for old, new in zip(held, fresh, strict=True)]
        self.codes, self.units = tuple(part for part, _ in grown), grown[0][1]
        left = self.tails - due
        self.tails = left if isinstance(left, int) else even(left)
        longest = int(torch.as_tensor(self.tails).max())
        index = torch.arange(longest, device=self.tail.device) + _column(due, self.tail)
        index = index.clamp(max=self.tail.shape[1] - 1).expand(len(self.tail), -1)
        self.tail = gather(self.tail, index)
        return True

    def decode(self) -> Tensor:
        """[N, S, D]: each row's tokens in their order; what stands behind the last of a row means nothing."""
        if not self.codes or self.codec is None:
            return self.tail
        encoded = self.codec.decode(self.codes, self.tail.shape[2]).flatten(1, 2).to(self.tail.dtype)
        whole = torch.cat([encoded, self.tail], 1)
        if isinstance(self.units, int):
            return whole
        slots = torch.arange(int(torch.as_tensor(self.lengths).max()), device=whole.device)
        split = _column(self.units * self.unit, whole)
        return gather(
            whole, torch.where(slots < split, slots, encoded.shape[1] + slots - split).clamp(max=len(whole[0]) - 1)
        )

    def widen(self, alive: Tensor) -> Tensor:
        """[N, S]: which slots stay where those alive [N, S] are to stay, because units go as a whole."""
        if self.unit == 1 or not self.codes:
            return alive
        size = self.codes[0].shape[1] * self.unit
        padded = torch.nn.functional.pad(alive, (0, max(0, size - alive.shape[1])))
        inside = torch.arange(size, device=alive.device) < _column(self.units * self.unit, self.tail)
        whole = (padded[:, :size] & inside).unflatten(1, (-1, self.unit)).any(-1).repeat_interleave(self.unit, 1)
        padded[:, :size] |= whole & inside
        return padded[:, : alive.shape[1]]

    def keep(self, stay: Tensor) -> None:
        """Let go of all slots but those that stay [N, S], of encoded units none or all."""
        split = _column(self.units * self.unit, self.tail)
        if self.codes:
            size = self.codes[0].shape[1] * self.unit
            padded = torch.nn.functional.pad(stay, (0, max(0, size - stay.shape[1])))[:, :size]
            whole = (padded & (torch.arange(size, device=stay.device) < split)).unflatten(1, (-1, self.unit)).any(-1)
            index, self.units = pack(whole)
            self.codes = tuple(gather(part, index) for part in self.codes)
        if self.tail.shape[1]:
            slots = torch.arange(self.tail.shape[1], device=stay.device)
            inside = stay.gather(1, (slots + split).clamp(max=stay.shape[1] - 1).expand(len(stay), -1))
            index, self.tails = pack(inside & (slots < _column(self.tails, self.tail)))
            self.tail = gather(self.tail, index)

    def select(self, rows: Tensor) -> Store:
        """A copy of some rows."""
        chosen: list[Count] = [n if isinstance(n, int) else n[rows] for n in (self.tails, self.units)]
        return Store(self.codec, self.tail[rows], chosen[0], tuple(part[rows] for part in self.codes), chosen[1])

    @property
    def nbytes(self) -> Count:
        """Bytes held of each row."""
        token = self.tail.shape[2] * self.tail.element_size()
        unit = sum(part.shape[2:].numel() * part.element_size() for part in self.codes)
        return self.units * unit + self.tails * token


def place(old: Tensor, counts: Count, new: Tensor, real: Tensor | None) -> tuple[Tensor, Count]:
    """Rows [N, L, ...], of which the first `counts` are held, and behind them those of `new` [N, T, ...] that are real.

    Returns rows as long as the longest, and how many each has.
    """
    before = torch.as_tensor(counts, device=new.device).expand(len(new))
    if real is None:
        real = torch.ones(new.shape[:2], dtype=torch.bool, device=new.device)
    after = before + real.sum(1)
    grown = new.new_zeros(len(new), int(after.max()), *new.shape[2:])
    held = int(before.max())
    grown[:, :held] = old[:, :held]
    row, column = real.nonzero(as_tuple=True)
    grown[row, (before[:, None] + real.cumsum(1) - 1)[row, column]] = new[row, column]
    return grown, even(after)


def pack(alive: Tensor) -> tuple[Tensor, Count]:
    """Places of what is alive [N, K] in each row, first, and in order: [N, most of a row], and how many they are."""
    counts = even(alive.sum(1))
    if isinstance(counts, int):  # a sort takes longer
        return alive.nonzero()[:, 1].view(len(alive), counts), counts
    order = (~alive).byte().argsort(dim=1, stable=True)
    return order[:, : int(counts.max())], counts


def gather(values: Tensor, index: Tensor) -> Tensor:
    """[N, M, ...]: the entries of [N, K, ...] at places [N, M] of each row."""
    return values[torch.arange(len(index), device=index.device)[:, None], index]  # `gather` does not know fp8


def even(counts: Tensor) -> Count:
    """The number that all rows share, if they do."""
    first = int(counts[0])
    return first if bool((counts == first).all()) else counts


def _column(count: Count, like: Tensor) -> Tensor:
    """[N or 1, 1]"""
    return torch.as_tensor(count, device=like.device).view(-1, 1)
