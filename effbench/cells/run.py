"""Running planned jobs: every record is written as soon as its cell ends."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

from effbench.cells.job import Job
from effbench.cells.local import STOPPING, Event, Local
from effbench.records.record import RETRIED, Record
from effbench.records.store import Store, latest


def run_cells(
    jobs: Sequence[Job], store: Store, executor: Local, watch: Callable[[Event], None] = lambda _: None
) -> tuple[list[Record], bool]:
    """Run jobs, write their records, and give these and whether a signal ended the run before its time.

    A cell that another run into the same folder has finished in the meantime is not run again. SIGINT, SIGTERM and
    SIGHUP kill the cells that are running and keep what is done; a second one raises `KeyboardInterrupt`.
    """
    records: list[Record] = []
    with _stop_on_signal() as stop:
        for event in executor.run(jobs, stop, lambda job: store.find(Record(job.cell, "ok", attempt=job.attempt))):
            if event.record is not None:
                event = _keep_record_of(event, store)
                assert event.record is not None
                records.append(event.record)
                _clear_scratch(event.job, event.record, store)
            watch(event)
        # What lay in a folder that was removed since then is written again.
        records = [record if store.holds(record) else _keep(store, record) for record in records]
        return records, stop.is_set() and len(records) < len(jobs)


def find_lost(records: Sequence[Record], store: Store) -> list[Record]:
    """Those of the records of one suite that were read from the store and are no more there."""
    if not records:
        return []
    cell = records[0].cell
    there = latest(store.read(cell.suite, cell.suite_version)[0])
    return [record for record in records if record.cell.identity not in there]


def _keep_record_of(event: Event, store: Store) -> Event:
    """The event with its record as it stands in the store."""
    assert event.record is not None
    kept = _keep(store, event.record)
    dropped = _tell_times(kept) != _tell_times(event.record) and not event.note
    note = "another run measured it first, whose record is kept" if dropped else event.note
    return dataclasses.replace(event, record=kept, note=note)


def _clear_scratch(job: Job, record: Record, store: Store) -> None:
    """Put the logs of a job's fits beside its record, and remove its checkpoints unless it is to be tried again."""
    if job.scratch is None or not job.scratch.is_dir():
        return
    beside = store.folder(record.cell.suite, record.cell.suite_version) / record.name
    with contextlib.suppress(OSError):  # a full disk costs the log, not the record
        for log in job.scratch.glob("*.jsonl"):
            shutil.copyfile(log, beside.with_suffix(f".{log.name}"))
    if record.outcome not in RETRIED:
        shutil.rmtree(job.scratch, ignore_errors=True)


def _tell_times(record: Record) -> tuple[str, float]:
    """What two runs of one cell differ in: when it began, to the second, and how long it took, to the millisecond."""
    return record.started, record.seconds


def _keep(store: Store, record: Record) -> Record:
    """The record as it stands in the store.

    One that cannot be written, for whatever reason, is a crash of its cell: the other cells go on, and the next run
    tries that one again.
    """
    try:
        return store.write(record)
    except Exception as error:
        cause = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        reason = f"the record could not be written: {cause}"
        return dataclasses.replace(record, outcome="crashed", reason=reason)


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    stop = threading.Event()

    def request_stop(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request_stop) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
