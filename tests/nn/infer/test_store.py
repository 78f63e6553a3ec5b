"""What a store holds equals plain lists, whatever is appended, let go of and encoded in whatever order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effbench.core.views import Codec
from effbench.nn.infer.store import Store

WIDTH = 2


def codec(unit: int, flush: int, retain: int) -> Codec:
    """Without loss: each number as its half and its other half, one after the other."""

    def encode(units: Tensor) -> tuple[Tensor, ...]:
        return torch.stack([units, units], -1).flatten(2) / 2, units[..., 0, :1]

    def decode(stored: tuple[Tensor, ...], width: int) -> Tensor:
        return stored[0].unflatten(-1, (unit, width, 2)).sum(-1)

    return Codec(encode, decode, unit, flush, retain)


class Lists:
    """The same in plain Python: of each row encoded units, and a tail of tokens."""

    def __init__(self, rows: int, form: Codec) -> None:
        self.form = form
        self.units: list[list[list[float]]] = [[] for _ in range(rows)]
        self.tails: list[list[float]] = [[] for _ in range(rows)]

    def row(self, i: int) -> list[float]:
        return [*(token for unit in self.units[i] for token in unit), *self.tails[i]]

    def append(self, new: list[list[float]]) -> None:
        for tail, tokens in zip(self.tails, new, strict=True):
            tail += tokens

    def flush(self) -> None:
        for units, tail in zip(self.units, self.tails, strict=True):
            while len(tail) - self.form.retain >= self.form.flush:
                for _ in range(self.form.flush // self.form.unit):
                    units.append(tail[: self.form.unit])
                    del tail[: self.form.unit]

    def keep(self, stay: list[list[bool]]) -> None:
        for i, marks in enumerate(stay):
            wanted = [token for token, mark in zip(self.row(i), marks, strict=False) if mark]
            self.units[i] = [unit for unit in self.units[i] if set(unit) & set(wanted)]
            self.tails[i] = [token for token in self.tails[i] if token in wanted]

    def select(self, rows: list[int]) -> Lists:
        new = Lists(len(rows), self.form)
        new.units, new.tails = [[*self.units[i]] for i in rows], [[*self.tails[i]] for i in rows]
        return new


def check(store: Store, lists: Lists) -> None:
    rows = len(lists.tails)
    held = store.decode()
    lengths = torch.as_tensor(store.lengths).expand(rows).tolist()
    assert [held[i, :n, 0].tolist() for i, n in enumerate(lengths)] == [lists.row(i) for i in range(rows)]
    assert [held[i, :n, 1].tolist() for i, n in enumerate(lengths)] == [[-x for x in lists.row(i)] for i in range(rows)]
    assert torch.as_tensor(store.units).expand(rows).tolist() == [len(units) for units in lists.units]
    unit = 2 * WIDTH * store.unit + 1  # numbers of four bytes
    sizes = [4 * (len(lists.units[i]) * unit + len(lists.tails[i]) * WIDTH) for i in range(rows)]
    assert torch.as_tensor(store.nbytes).expand(rows).tolist() == sizes


@pytest.mark.parametrize(("unit", "flush"), [(1, 1), (4, 4), (4, 8)])
@pytest.mark.parametrize("retain", [0, 3])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_store_equals_plain_lists(unit, flush, retain, data):
    form = codec(unit, flush, retain)
    rows, number = data.draw(st.integers(1, 4)), 0
    store, lists = Store(form, torch.zeros(rows, 0, WIDTH), 0), Lists(rows, form)
    chance = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    steps = st.sampled_from(["all", "some", "flush", "keep", "select"])
    for step in data.draw(st.lists(steps, min_size=3, max_size=14)):
        if step in ("all", "some"):
            length = data.draw(st.integers(1, 11))
            tokens = torch.arange(number, number + rows * length).view(rows, length).float() + 1
            number += rows * length
            real = torch.rand(rows, length, generator=chance) < 0.6 if step == "some" else None
            store.append(torch.stack([tokens, -tokens], -1), real)
            lists.append([(row if real is None else row[real[i]]).tolist() for i, row in enumerate(tokens)])
        elif step == "flush":
            store.flush()
            lists.flush()
        elif step == "keep" and store.decode().shape[1]:
            share = data.draw(st.sampled_from([0.1, 0.7, 1.0]))
            stay = torch.rand(rows, store.decode().shape[1], generator=chance) < share
            stay &= torch.arange(stay.shape[1]) < torch.as_tensor(store.lengths).view(-1, 1)
            store.keep(store.widen(stay.clone()))
            lists.keep(stay.tolist())
        elif step == "select":
            chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
            before, old = store, lists
            store, lists, rows = store.select(torch.tensor(chosen)), lists.select(chosen), len(chosen)
            check(before, old)
        check(store, lists)


@pytest.mark.parametrize("retain", [0, 3])
def test_a_copy_lives_by_itself(retain):
    """What happens to a selection leaves the store it was taken from as it was."""
    store = Store(codec(4, 4, retain), torch.zeros(2, 0, WIDTH), 0)
    store.append(torch.arange(44.0).view(2, 11, WIDTH), None)
    store.flush()
    before = store.decode().clone()
    copy = store.select(torch.tensor([1, 0]))
    copy.append(torch.zeros(2, 5, WIDTH), torch.tensor([[True] * 5, [False] * 5]))
    copy.flush()
    copy.keep(copy.widen(torch.arange(copy.decode().shape[1]).expand(2, -1) > 6))
    assert torch.equal(store.decode(), before) and store.lengths == 11


def test_what_is_encoded_leaves_the_tail():
    """The memory of tokens that have been encoded is given back."""
    store = Store(codec(4, 8, 3), torch.zeros(1, 0, WIDTH), 0)
    store.append(torch.ones(1, 100, WIDTH), None)
    store.flush()
    assert store.tail.shape[1] == 4 and store.tail.untyped_storage().nbytes() == 4 * WIDTH * 4
