"""Publishing: many records become one file, and what it supersedes goes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from effbench.core.errors import Usage
from effbench.core.files import replace_file
from effbench.records import files, packed, shared
from effbench.records.reader import Reader, samples_of
from effbench.records.record import Record, Unreadable, summarize
from effbench.records.samples import Samples, columns, split_layers
from effbench.records.store import Store


class References(msgspec.Struct):
    """What a written record refers to."""

    environment: str = ""
    protocols: str = ""
    samples: str = ""


def publish_records(records: Sequence[Record], results: Path, publication: str) -> Path:
    """Make `publication` hold exactly these records, all of one version of a suite; returns its file.

    Record files of the same tiers, models and data are superseded and removed, and so is what no record refers to any
    more. Meant for a folder that no run writes to at the same time. Raises `Usage` for records that do not belong
    together and `OSError` when they cannot be written; the publication is then what it was before.
    """
    store = Store(results)
    places = {(record.cell.suite, record.cell.suite_version) for record in records}
    if not re.fullmatch(r"\w[\w.-]*", publication):
        raise Usage(f"publication {publication!r}: its name becomes a file's, so letters, digits, dots and dashes")
    if len(places) != 1 or len({record.name for record in records}) != len(records):
        raise Usage(f"publication {publication!r}: its records must be of one version of one suite, each once")
    ((suite, version),) = places
    folder = store.folder(suite, version)
    path = folder / f"{publication}{packed.SUFFIX}"
    entries = []
    for record in records:
        summary = summarize(record)
        log, layers = split_layers(summary.log)
        samples = Samples(columns(summary.samples), layers)  # type: ignore[arg-type]
        referring = msgspec.structs.replace(
            summary,
            environment=shared.add_environment(store.records, summary.environment),  # type: ignore[arg-type]
            protocols=shared.add_protocols(folder, summary.protocols),  # type: ignore[arg-type]
            samples={},
            layers=bool(layers),
            log=log,
        )
        entries.append((record.name, referring, samples))
    replace_file(path, packed.pack(entries))
    _remove_superseded(folder, {_subject(record) for record in records})
    remove_unreferenced(store)
    return path


def remove_unreferenced(store: Store) -> None:
    """Remove environments, protocols and results per item that no record refers to, and folders that hold nothing.

    Removes nothing where a record is unreadable, for nobody knows what that one refers to.
    """
    environments: set[str] = set()
    kept: dict[Path, tuple[set[str], set[str]]] = {}
    try:
        for folder in store.folders():
            references = _references(folder)
            environments |= {each.environment for each in references}
            kept[folder] = {each.protocols for each in references}, {each.samples for each in references}
    except Unreadable:
        return
    for path in (store.records / shared.ENVIRONMENTS).glob("*.json"):
        if path.stem not in environments:
            path.unlink()
    for folder, (sets, samples) in kept.items():
        for path in samples_of(folder).glob("*.json.gz"):
            if path.name.partition(".")[0] not in samples:
                path.unlink()
        with files.locked(folder):
            protocols = shared.read_protocols(folder)
            chosen = {name: one for name, one in protocols.sets.items() if name in sets}
            used = {text for one in chosen.values() for text in one.values()}
            texts = {name: text for name, text in protocols.texts.items() if name in used}
            if not chosen:
                (folder / shared.PROTOCOLS).unlink(missing_ok=True)
            elif (texts, chosen) != (protocols.texts, protocols.sets):
                replace_file(folder / shared.PROTOCOLS, shared.Protocols(texts, chosen).encode())
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()


def _references(folder: Path) -> list[References]:
    """What the records of a folder refer to. Raises `Unreadable`."""
    references: list[References] = []
    for path in folder.iterdir():
        if path.suffix == packed.SUFFIX:
            summaries, notes = packed.read_summaries(path)
            if notes:
                raise Unreadable(f"{path}: {notes[0]}")
            references += [References(str(one.environment), str(one.protocols)) for one in summaries.values()]
        elif path.suffix == ".json" and path.name != shared.PROTOCOLS:
            try:
                written = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
            except msgspec.MsgspecError as error:
                raise Unreadable(f"{path}: {error}") from None
            told = {name: value for name, value in written.items() if isinstance(value, str)}
            references.append(References(*(told.get(name, "") for name in References.__struct_fields__)))
    return references


def _remove_superseded(folder: Path, subjects: set[tuple[str, str, str]]) -> None:
    """Remove record files of the tiers, models and data that a publication is about."""
    reader = Reader(folder)
    for path in folder.glob("*.json"):
        if path.name == shared.PROTOCOLS:
            continue
        try:
            record = reader.read_record(path)
        except Unreadable:
            continue  # not known to be superseded
        if _subject(record) in subjects:
            path.unlink()


def _subject(record: Record) -> tuple[str, str, str]:
    return record.cell.tier, record.cell.model, record.cell.data
