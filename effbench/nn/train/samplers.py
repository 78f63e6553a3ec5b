"""Which examples a step reads. A sampler's `draw` is a function of the step alone, so that a fit can go on anywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol


class Sampler(Protocol):
    """What the slot `train.sampler` holds: made when a fit starts, so that it sees what all selections left.

    What it keeps between steps lies in `run.state(method)`. One with a method `seen(places, losses)` is told after each
    step the mean loss [B] of every example that it drew.
    """

    def draw(self, step: int, batch_size: int) -> list[int]:
        """Places in `run.data.train` of the examples of a step, of which there may be fewer than `batch_size`."""


class Shuffled:
    """Examples in a new random order each epoch; what a fit uses where the slot is empty."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def draw(self, step: int, batch_size: int) -> list[int]:
        """The next `batch_size` places; a batch may reach into the next epoch."""
        start = step * batch_size
        return [self._at(place) for place in range(start, start + batch_size)]

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(self.size))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self._order[index]


class ByLength:
    """Batches of examples of similar length, in random order: less padding, and no batch tells the next one's length.

    An epoch is shuffled, cut into stretches of `SPREAD` batches, and each stretch is sorted by length.
    """

    SPREAD = 32  # batches that are sorted together

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        self.lengths = lengths
        self.seed = seed
        self._made: tuple[int, int] | None = None  # epoch and batch size of the batches here
        self._batches: list[list[int]] = []

    def draw(self, step: int, batch_size: int) -> list[int]:
        """One batch; the last of an epoch may be smaller."""
        epoch, number = divmod(step, -(-len(self.lengths) // batch_size))
        if self._made != (epoch, batch_size):
            self._made, self._batches = (epoch, batch_size), self._cut(epoch, batch_size)
        return self._batches[number]

    def _cut(self, epoch: int, batch_size: int) -> list[list[int]]:
        chance = random.Random(f"{self.seed}/{epoch}/length")
        order = list(range(len(self.lengths)))
        chance.shuffle(order)
        stretch = self.SPREAD * batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), stretch):
            part = sorted(order[start : start + stretch], key=self.lengths.__getitem__)
            batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        chance.shuffle(batches)
        return batches


class InOrder:
    """Examples as they lie, batch for batch, epoch after epoch; the last batch of an epoch may be smaller."""

    def __init__(self, size: int) -> None:
        self.size = size

    def draw(self, step: int, batch_size: int) -> list[int]:
        """The next batch."""
        start = step % -(-self.size // batch_size) * batch_size
        return list(range(start, min(start + batch_size, self.size)))


class Repeated:
    """The batches of another sampler, each several steps in a row."""

    def __init__(self, sampler: Sampler, times: int) -> None:
        self.sampler = sampler
        self.times = times

    def draw(self, step: int, batch_size: int) -> list[int]:
        """The batch that this step is the first to read, or reads again."""
        return self.sampler.draw(step // self.times, batch_size)
