"""Reading the records of one version of a suite, whatever state the files are in.

What is no record is skipped and named. What lies in a file beside a record may be missing or damaged: the record is
then read without it, and a note says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from effbench.records import packed, shared
from effbench.records.lazy import Lazy
from effbench.records.record import Record, Summary, Unreadable, as_record, read_text
from effbench.records.samples import Samples, from_columns, read_samples, samples_file

T = TypeVar("T")


def samples_of(folder: Path) -> Path:
    """Where the results per item of a folder of records lie."""
    version, suite, records = folder, folder.parent, folder.parent.parent
    return records.parent / "samples" / suite.name / version.name


def read_record(path: Path) -> Record:
    """One record by its file, with what lies beside it. Raises `Unreadable`."""
    return Reader(path.parent).read_record(path)


class Reader:
    """Reads records of one folder; what they share is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = samples_of(folder)
        self.notes: list[str] = []  # what was skipped or is missing
        self._environments: dict[str, dict[str, Any]] = {}
        self._sets: dict[str, dict[str, str]] = {}
        self._protocols: shared.Protocols | None = None

    def read(self) -> list[Record]:
        """All readable records of the folder, sorted by file."""
        records: list[Record] = []
        try:
            paths = sorted(self.folder.iterdir())
        except OSError as error:
            self.notes.append(f"{self.folder}: skipped, it cannot be read ({error.strerror})")
            return []
        for path in paths:
            try:
                records += self.read_file(path)
            except Unreadable as error:
                self.notes.append(f"{path}: skipped, {error}")
        return records

    def read_file(self, path: Path) -> list[Record]:
        """The records of a file of this folder, none where it is of another kind. Raises `Unreadable`."""
        if path.suffix == packed.SUFFIX:
            return self._read_publication(path)
        if path.suffix == ".json" and path.name != shared.PROTOCOLS:
            return [self._in_place(self.read_record(path))]
        return []

    def read_record(self, path: Path) -> Record:
        """One record. Raises `Unreadable`."""
        try:
            text = path.read_bytes()
        except OSError as error:
            raise Unreadable(f"it cannot be read ({error.strerror})") from None
        summary = read_text(text)
        samples = summary.samples
        if not isinstance(samples, str):
            return self._record(summary, samples, None)
        lazily, layers = _load_later(functools.partial(read_samples, self.samples, samples), path)
        if not samples_file(self.samples, samples).is_file():
            self.notes.append(f"{path}: its results per item ({samples}) are missing")
        return self._record(summary, lazily, layers if summary.layers else None)

    def _read_publication(self, path: Path) -> list[Record]:
        """All readable records of a publication. Raises `Unreadable`."""
        records: list[Record] = []
        summaries, notes = packed.read_summaries(path)
        self.notes += [f"{path}: {note}" for note in notes]
        for name, summary in sorted(summaries.items()):
            try:
                lazily, layers = _load_later(functools.partial(packed.read_packed, path, name), path)
                records.append(self._in_place(self._record(summary, lazily, layers if summary.layers else None)))
            except Unreadable as error:
                self.notes.append(f"{path}: {name}: skipped, {error}")
        return records

    def _record(self, summary: Summary, samples: Mapping[str, Any], layers: Mapping[str, Any] | None) -> Record:
        environment, protocols = summary.environment, summary.protocols
        if isinstance(environment, str):
            environment = self._look_up(self._environments, environment, self._environment)
        if isinstance(protocols, str):
            protocols = self._look_up(self._sets, protocols, self._protocol_set)
        return as_record(summary, environment, protocols, samples, layers)

    def _in_place(self, record: Record) -> Record:
        """The record, if it belongs into this folder. Raises `Unreadable`."""
        cell = record.cell
        if (cell.suite, f"v{cell.suite_version}") != (self.folder.parent.name, self.folder.name):
            raise Unreadable(f"it belongs to {cell.suite}/v{cell.suite_version}")
        return record

    def _look_up(self, known: dict[str, dict[str, T]], name: str, read: Callable[[str], dict[str, T]]) -> dict[str, T]:
        """Content by its digest, read once; empty, with a note, where it cannot be had."""
        if name not in known:
            try:
                known[name] = read(name)
            except Unreadable as error:
                known[name] = {}
                self.notes.append(str(error))
        return known[name]

    def _environment(self, name: str) -> dict[str, Any]:
        records = self.folder.parent.parent
        try:
            return shared.read_environment(records, name)
        except Unreadable as error:
            path = records / shared.ENVIRONMENTS / f"{name}.json"
            raise Unreadable(f"{path}: {error}; its records do not say where they were measured") from None

    def _protocol_set(self, name: str) -> dict[str, str]:
        try:
            if self._protocols is None:
                self._protocols = shared.Protocols()
                self._protocols = shared.read_protocols(self.folder)
            return self._protocols.find(name)
        except Unreadable as error:
            path = self.folder / shared.PROTOCOLS
            raise Unreadable(f"{path}: {error}; its records do not say how they were measured") from None


def _load_later(load: Callable[[], Samples], path: Path) -> tuple[Lazy[list[Any]], Lazy[Any]]:
    """Results per item and log of layers, read when one of them is looked at, and empty where they cannot be had."""

    @functools.cache
    def content() -> tuple[dict[str, list[Any]], dict[str, Any]]:
        try:
            samples = load()
            return from_columns(samples.columns), samples.layers
        except Unreadable as error:
            logging.getLogger(__name__).warning("%s: its results per item are not used: %s", path, error)
            return {}, {}

    return Lazy(lambda: content()[0]), Lazy(lambda: content()[1])
