"""A job: a cell with what it takes to run it here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from effbench.machine import devices
from effbench.records.record import Cell
from effbench.sources import DataSource, Source


@dataclasses.dataclass(frozen=True)
class Place:
    """A device to run cells on, with the lock file that all cells there share."""

    device: str  # cpu or cuda:N
    gate: Path
    visible: str = ""  # CUDA_VISIBLE_DEVICES of a process that sees this device alone

    def entered(self) -> Place:
        """This place for a process that works nowhere else and has not started CUDA: its first device, and the only."""
        if not self.visible:
            return self
        os.environ[devices.VISIBLE] = self.visible
        return dataclasses.replace(self, device="cuda:0")


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell with what it takes to run it here."""

    cell: Cell
    source: Source
    data: DataSource
    places: tuple[Place, ...]  # alike, any of them will do; once the job has started, that of each rank
    attempt: int = 1
    ranks: int = 1  # processes that it takes
    rank: int = 0  # of the process that works on it
    scratch: Path | None = None  # a folder that is its own until it is done, for checkpoints
    cache: Path | None = None  # a folder that all jobs share
    probes: tuple[str, ...] = ()  # that are taken, of those in the settings

    def at(self, places: Sequence[Place]) -> Job:
        """This job with the places of its ranks decided."""
        return dataclasses.replace(self, places=tuple(places))

    def entered(self, rank: int) -> Job:
        """This job in the process of a rank, which works at its place and nowhere else."""
        places = [place.entered() if number == rank else place for number, place in enumerate(self.places)]
        return dataclasses.replace(self, places=tuple(places), rank=rank)

    @property
    def place(self) -> Place:
        """Where this process works on the job."""
        return self.places[self.rank]
