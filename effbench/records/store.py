"""The folder of records: one JSON file each, written once and never changed.

`results/records/<suite>/v<version>/<name>.json`. Several runs may write into one folder at the same time: a
record appears whole or not at all, and of two runs that measured the same cell the first to finish is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from effbench.core.errors import Usage
from effbench.records.record import RETRIED, Record, Unreadable, from_json


class Store:
    """Records under one results folder."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.records = results / "records"

    def check(self) -> None:
        """Raise `Usage` unless records could be written here; creates nothing."""
        nearest = next(path for path in (self.records, *self.records.resolve().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest):
                pass
        except OSError as error:
            raise Usage(
                f"results={self.results}: cannot write there ({error.strerror}); choose another folder"
            ) from None

    def folder(self, suite: str, version: int) -> Path:
        """Where the records of one version of a suite lie."""
        return self.records / suite / f"v{version}"

    def read(self, suite: str | None = None, version: int | None = None) -> tuple[list[Record], list[str]]:
        """All readable records, every attempt, sorted by file; and a note for each file that is skipped."""
        records: list[Record] = []
        notes: list[str] = []
        for path in sorted(self.records.glob(f"{suite or '*'}/{f'v{version}' if version else 'v*'}/*.json")):
            try:
                records.append(from_json(path.read_text(encoding="utf-8")))
            except (Unreadable, OSError, UnicodeDecodeError) as error:
                notes.append(f"{path}: skipped, {error}")
        return records, notes

    def write(self, record: Record) -> Record:
        """Add a record; returns the one that stands for its cell.

        That is another run's if it has finished the same attempt with a final outcome. If that attempt is one
        to be tried again, this record becomes the next attempt. Raises `OSError` when the disk is full.
        """
        folder = self.folder(record.cell.suite, record.cell.suite_version)
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            with _written(folder, record.to_json()) as temporary:
                try:
                    os.link(temporary, folder / record.name)  # fails where a rename would overwrite
                    _sync(folder)
                    return record
                except FileExistsError:
                    pass
            with contextlib.suppress(Unreadable, UnicodeDecodeError):
                other = from_json((folder / record.name).read_text(encoding="utf-8"))
                if other.outcome not in RETRIED:
                    return other
            record = dataclasses.replace(record, attempt=record.attempt + 1)


def latest(records: Iterable[Record]) -> dict[str, Record]:
    """The last attempt at each cell, by identity, in order of first appearance."""
    last: dict[str, Record] = {}
    for record in records:
        before = last.get(record.cell.identity)
        if before is None or _rank(record) > _rank(before):
            last[record.cell.identity] = record
    return last


def _rank(record: Record) -> tuple[bool, int]:
    """Final outcomes stand above those to be tried again, later attempts above earlier ones."""
    return record.outcome not in RETRIED, record.attempt


@contextlib.contextmanager
def _written(folder: Path, text: str) -> Iterator[Path]:
    """A temporary file in `folder` with `text` safely on disk; removed on exit."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files private; records are for everyone
        yield Path(name)
    finally:
        os.unlink(name)


def _sync(folder: Path) -> None:
    """Make a new directory entry survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
