"""A folder of records. Written once and never changed; several runs may write into one folder at the same time.

    records/<suite>/v<version>/<record>.json          one record
    records/<suite>/v<version>/<publication>.parquet  many records, published together
    records/<suite>/v<version>/protocols.json         how metrics were measured
    records/environments/<digest>.json                on what, and with what
    samples/<suite>/v<version>/<digest>.json.gz       results per item of one record that is not published

A record appears whole or not at all, and of two runs that measured the same cell the first to finish is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from effbench.core.errors import Usage
from effbench.records import files, shared
from effbench.records.reader import Reader, samples_of
from effbench.records.record import RETRIED, Record, Summary, Unreadable, summarize, write_text
from effbench.records.samples import add_samples, split_layers

if TYPE_CHECKING:
    import pyarrow as pa


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

    def folders(self, suite: str | None = None, version: int | None = None) -> list[Path]:
        """Folders with records of a suite and version, or of all."""
        suites = self.records.glob("*") if suite is None else [self.records / suite]
        pattern = "v*" if version is None else f"v{version}"
        return sorted(path for each in suites if each.name != shared.ENVIRONMENTS for path in each.glob(pattern))

    def read(self, suite: str | None = None, version: int | None = None) -> tuple[list[Record], list[str]]:
        """All readable records, every attempt, sorted by file; and a note for all that is skipped or missing."""
        records: list[Record] = []
        notes: list[str] = []
        for folder in self.folders(suite, version):
            reader = Reader(folder)
            records += reader.read()
            notes += reader.notes
        return records, list(dict.fromkeys(notes))

    def index(self, suite: str | None = None) -> tuple[pa.Table, list[str]]:
        """A row for every readable record of a suite or of all, and a note for what is skipped; see `index.py`."""
        from effbench.records.index import index

        return index(self, suite)

    def write(self, record: Record) -> Record:
        """Add a record; returns the one that stands for its cell.

        That is another run's if it has finished the same attempt with a final outcome. If that attempt is one
        to be tried again, this record becomes the next attempt. Raises `OSError` when the disk is full or the folder
        cannot be written to; whatever the record holds is brought into a form that can be written.
        """
        folder = self.folder(record.cell.suite, record.cell.suite_version)
        summary: Summary | None = None
        while True:
            if self.holds(record):
                if other := self.find(record):
                    return other
                record = dataclasses.replace(record, attempt=record.attempt + 1)
                continue
            summary = summary or self._refer(folder, summarize(record))
            summary.attempt = record.attempt
            if files.add(folder / record.name, write_text(summary).encode()):
                return record

    def find(self, record: Record) -> Record | None:
        """The final record of the attempt of `record` or of a later one, if there is one that can be read."""
        folder = self.folder(record.cell.suite, record.cell.suite_version)
        while self.holds(record):
            with contextlib.suppress(Unreadable):
                other = Reader(folder).read_record(folder / record.name)
                if other.outcome not in RETRIED:
                    return other
            record = dataclasses.replace(record, attempt=record.attempt + 1)
        return None

    def holds(self, record: Record) -> bool:
        """Whether there is a file in the place of `record`; there is none where it cannot be looked at."""
        return os.path.exists(self.folder(record.cell.suite, record.cell.suite_version) / record.name)

    def _refer(self, folder: Path, summary: Summary) -> Summary:
        """Write content that lies in files beside a summary; returns the summary with their digests instead."""
        log, layers = split_layers(summary.log)
        samples = summary.samples
        if samples or layers:
            samples = add_samples(samples_of(folder), samples, layers)  # type: ignore[arg-type]
        return msgspec.structs.replace(
            summary,
            environment=shared.add_environment(self.records, summary.environment),  # type: ignore[arg-type]
            protocols=shared.add_protocols(folder, summary.protocols),  # type: ignore[arg-type]
            samples=samples,
            layers=bool(layers),
            log=log,
        )


def latest(records: Iterable[Record]) -> dict[str, Record]:
    """The last attempt at each cell, by identity, in order of first appearance."""
    last: dict[str, Record] = {}
    for record in records:
        identity = record.cell.identity
        before = last.get(identity)
        if before is None or _rank(record) > _rank(before):
            last[identity] = record
    return last


def _rank(record: Record) -> tuple[bool, int]:
    """Final outcomes stand above those to be tried again, later attempts above earlier ones."""
    return record.outcome not in RETRIED, record.attempt
