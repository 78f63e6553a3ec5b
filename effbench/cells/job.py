"""A job: a cell with what it takes to run it here."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from effbench.machine import devices
from effbench.records.record import Cell
from effbench.sources import DataSource, Source

if TYPE_CHECKING:
    pass


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
    places: tuple[Place, ...]  # alike, any of them will do; one once the job has started
    attempt: int = 1

    def at(self, place: Place) -> Job:
        """This job with its place decided."""
        return dataclasses.replace(self, places=(place,))

    @property
    def place(self) -> Place:
        """Where the job runs."""
        (place,) = self.places
        return place
