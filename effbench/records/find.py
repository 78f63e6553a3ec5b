"""One record by what a person writes: a file, SUITE/ROW, the name of a row, an identity, or a name as listed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effbench.core.errors import Usage
from effbench.core.usage import list_some, named_path, nearest
from effbench.records import packed
from effbench.records.reader import read_record
from effbench.records.record import Record, Unreadable
from effbench.records.store import Store, latest

IDENTITY = re.compile(r"[0-9a-f]{8,16}")  # a cell's, or its beginning
NARROWING = ("tier", "model", "seed")  # what rows of one name differ in, and options tell apart


def find_record(name: str, results: Path, **narrower: Any) -> Record:
    """The record of that name in a folder of results, or in that file.

    `narrower` says which of several is meant, by `NARROWING`; None where it does not matter. Raises `Usage` for a file
    that is no record, and where none or more than one fits.
    """
    path = named_path("record", name)
    if path.is_file():
        return _read(path, {field: value for field, value in narrower.items() if value is not None})
    suite, slash, row = name.partition("/")
    store = Store(results)
    suites = sorted({folder.parent.name for folder in store.folders()})
    if not suites:
        raise Usage(f"record {name!r}: no such file, and there are no records in {store.records}")
    named = suite if slash and suite in suites else None
    records = list(latest(store.read(named)[0]).values())
    found = [record for record in records if _is_called(record, row if named else name)]
    if not found:
        known = {f"{record.cell.suite}/{record.cell.recipe}" for record in records}
        hint = nearest(name, known) if slash else f"; name one as SUITE/ROW, of the suites {', '.join(suites)}"
        raise Usage(f"record {name!r}: no such file, and no record in {store.records} has this name{hint}")
    fitting = [record for record in found if _fits(record, narrower)]
    if not fitting:
        given = [field for field in NARROWING if narrower.get(field) is not None]
        asked = " ".join(f"{field}={narrower[field]}" for field in given)
        there = ", ".join(f"{field}={_list_values(found, field)}" for field in given)
        raise Usage(f"record {name!r}: none is of {asked}; there is {there}")
    if len(fitting) > 1:
        raise Usage(f"record {name!r}: {len(fitting)} have this name; {_tell_apart(fitting)}")
    return fitting[0]


def _read(path: Path, narrower: dict[str, Any]) -> Record:
    """The record of a file. Raises `Usage`."""
    if path.suffix == packed.SUFFIX:
        raise Usage(f"record {path}: holds many records; name one as SUITE/ROW, such as quant/gptq-4b tier={path.stem}")
    if narrower:
        raise Usage(
            f"{next(iter(narrower))}= chooses among records of one name, and {path} is one record: leave it out"
        )
    try:
        return read_record(path)
    except (Unreadable, ValueError) as error:
        raise Usage(f"record {path}: {error}") from None


def _is_called(record: Record, name: str) -> bool:
    cell = record.cell
    by_identity = IDENTITY.fullmatch(name) and cell.identity.startswith(name)
    return bool(by_identity) or name in (cell.recipe, cell.steps, record.name, record.name.removesuffix(".json"))


def _fits(record: Record, narrower: dict[str, Any]) -> bool:
    return all(value is None or getattr(record.cell, field) == value for field, value in narrower.items())


def _tell_apart(records: Sequence[Record]) -> str:
    """How to name one of several: by suite, by the options in which they differ, else by identity."""
    names = sorted({f"{record.cell.suite}/{record.cell.recipe}" for record in records})
    if len(names) > 1:
        return f"name it {' or '.join(names)}"
    values = {field: _list_values(records, field) for field in NARROWING}
    if options := [f"{field}={listed}" for field, listed in values.items() if "|" in listed]:
        return f"add {' '.join(options)}"
    return f"name one by its identity: {list_some([record.cell.identity for record in records])}"


def _list_values(records: Sequence[Record], field: str) -> str:
    """What there is of a field, between bars."""
    return "|".join(map(str, sorted({getattr(record.cell, field) for record in records})))
