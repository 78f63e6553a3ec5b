"""Running planned jobs: every record is written as soon as its cell ends."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

from effbench.cells.job import Job
from effbench.cells.local import STOPPING, Event, Local
from effbench.records.record import Record
from effbench.records.store import Store


def run_cells(
    jobs: Sequence[Job], store: Store, executor: Local, watch: Callable[[Event], None] = lambda _: None
) -> tuple[list[Record], bool]:
    """Run jobs, write their records, and give these and whether a signal ended the run before its time.

    SIGINT, SIGTERM and SIGHUP kill the cells that are running and keep what is done; a second one raises
    `KeyboardInterrupt`.
    """
    records: list[Record] = []
    with _stop_on_signal() as stop:
        for event in executor.run(jobs, stop):
            if event.record is not None:
                event = dataclasses.replace(event, record=_kept(store, event.record))
                assert event.record is not None
                records.append(event.record)
            watch(event)
        return records, stop.is_set() and len(records) < len(jobs)


def _kept(store: Store, record: Record) -> Record:
    """The record as it stands in the store; one that cannot be written is a crash and its cell runs again."""
    try:
        return store.write(record)
    except OSError as error:
        reason = f"the record could not be written: {error.strerror}"
        return dataclasses.replace(record, outcome="crashed", reason=reason)


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    stop = threading.Event()

    def ask(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
