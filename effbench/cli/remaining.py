"""How long a run will still take: by what its rows took before, by cells that ended, and by how far others are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from effbench.cells.job import Job
from effbench.cells.local import Event


class Working(NamedTuple):
    """A cell at work."""

    event: Event  # last news
    since: float  # start of the cell
    entered: float  # start of its phase


class Remaining:
    """What is known of the time that jobs take, `at_a_time` of them at once.

    expected  by identity of a cell, seconds that its row took before
    """

    def __init__(self, todo: Sequence[Job], expected: Mapping[str, float], at_a_time: int) -> None:
        self.working: dict[str, Working] = {}
        self._expected = dict(expected)
        self._waiting = [job.cell.identity for job in todo]
        self._at_a_time = at_a_time
        self._took: dict[str, float] = {}  # seconds of cells that ended

    def watch(self, event: Event) -> None:
        """Take in news of a job."""
        identity, now = event.job.cell.identity, time.monotonic()
        if event.record is not None:
            self.working.pop(identity, None)
            if identity in self._waiting:
                self._waiting.remove(identity)
            if event.record.outcome == "ok" and not event.note:
                self._took[identity] = event.record.seconds
            return
        before = self.working.get(identity, Working(event, now, now))
        entered = before.entered if event.progress else now
        self.working[identity] = Working(event, before.since, entered)

    def seconds(self) -> float | None:
        """Seconds until all have ended; None while nothing is known."""
        now, took = time.monotonic(), dict(self._took)  # of this moment: a display asks from a thread of its own
        known = {identity: self._estimate(identity, now, took) for identity in list(self._waiting)}
        totals = [*took.values(), *(total for total in known.values() if total is not None)]
        if not totals or not known:
            return None
        mean = sum(totals) / len(totals)
        left = 0.0
        for identity, total in known.items():
            cell = self.working.get(identity)
            elapsed = 0.0 if cell is None else now - cell.since
            left += max(0.0, (mean if total is None else total) - elapsed)
        return left / min(self._at_a_time, len(known))

    def _estimate(self, identity: str, now: float, took: Mapping[str, float]) -> float | None:
        """What one cell takes in all: as before, at the pace of those that ended; or by how far its phase has come."""
        if identity in self._expected:
            both = [(seconds, self._expected[name]) for name, seconds in took.items() if name in self._expected]
            before = sum(seconds for _, seconds in both)
            pace = sum(seconds for seconds, _ in both) / before if before else 1.0
            return pace * self._expected[identity]
        cell = self.working.get(identity)
        if cell is None or cell.event.progress is None:
            return None
        _, done, total = cell.event.progress
        return cell.entered - cell.since + (now - cell.entered) * total / max(1, done)
