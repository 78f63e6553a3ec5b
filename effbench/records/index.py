"""A table of all records of a folder, for finding and listing them among many.

It is kept beside the records, in `.index/`, and brought up to date when it is asked for: records never change, so
names of files tell what is new and what is gone. Where it cannot be kept it is made anew each time.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.core.errors import Usage
from effbench.core.files import replace_file
from effbench.core.usage import nearest, one_of
from effbench.records import files, packed, shared
from effbench.records.definitions import HEADLINES
from effbench.records.reader import Reader
from effbench.records.record import OUTCOMES, Record, Unreadable
from effbench.records.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

FOLDER = ".index"
FILTERS = ("suite", "recipe", "outcome")
TEXTS = ("file", "name", "suite", "tier", "recipe", "steps", "model", "outcome", "started", "host")
NUMBERS = ("version", "seed", "attempt")
LISTED = ("suite", "version", "tier", "recipe", "model", "seed", "outcome", "started", "host", "name")


def index(store: Store, suite: str | None = None) -> tuple[pa.Table, list[str]]:
    """A row for every readable record of a suite or of all, and a note for what is skipped.

    Columns: `file` that the record is in, its `name`, what `LISTED` names, and a number for each of `HEADLINES`.
    """
    import pyarrow as pa

    tables, notes = [schema().empty_table()], []
    for folder in store.folders(suite):
        table, more = _folder_index(store, folder)
        tables.append(table)
        notes += more
    return pa.concat_tables(tables), notes


def list_records(results: Path, filters: Mapping[str, str | None]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows for `effbench list records`: every attempt that fits the filters, and a note for what is skipped.

    Filters are `suite` and `outcome`, which are names, and `recipe`, which is a pattern for the name or the steps of a
    recipe such as `gptq*`. Raises `Usage` for a suite without records and for an unknown outcome.
    """
    import pyarrow.compute as pc

    store = Store(results)
    one_of("outcome", filters.get("outcome"), OUTCOMES)
    suite = filters.get("suite")
    suites = sorted({folder.parent.name for folder in store.folders()})
    if suite is not None and suite not in suites:
        raise Usage(f"no records of suite {suite!r} in {store.records}{nearest(suite, suites)}")
    table, notes = index(store, suite)
    if outcome := filters.get("outcome"):
        table = table.filter(pc.equal(table["outcome"], outcome))
    if pattern := filters.get("recipe"):
        by_name, by_steps = (_matches(table[column], pattern) for column in ("recipe", "steps"))
        table = table.filter(pc.or_(by_name, by_steps))
    table = table.sort_by([(column, "ascending") for column in ("suite", "version", "started", "name")])
    return table.select([*LISTED, *HEADLINES]).to_pylist(), notes


def schema() -> pa.Schema:
    """Names and types of the columns."""
    import pyarrow as pa

    return pa.schema(
        [(name, pa.string()) for name in TEXTS]
        + [(name, pa.int64()) for name in NUMBERS]
        + [(name, pa.float64()) for name in HEADLINES]
    )


def _matches(column: pa.ChunkedArray, pattern: str) -> pa.ChunkedArray:
    """Which texts of a column fit a pattern of the shell's."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.is_in(column, pa.array(fnmatch.filter(pc.unique(column).to_pylist(), pattern), pa.string()))


def _folder_index(store: Store, folder: Path) -> tuple[pa.Table, list[str]]:
    """The index of one version of a suite, from the one that was kept and what has changed since."""
    import pyarrow as pa
    import pyarrow.compute as pc

    path = store.results / FOLDER / f"{folder.parent.name}-{folder.name}.parquet"
    known = _read(path)
    present = dict(_present(folder))
    there = set(pc.unique(known["file"]).to_pylist())
    if gone := there - present.keys():
        known = known.filter(pc.invert(pc.is_in(known["file"], pa.array(sorted(gone)))))
    reader = Reader(folder)
    rows = []
    for key in sorted(present.keys() - there):
        try:
            rows += [_row(key, record) for record in reader.read_file(present[key])]
        except Unreadable as error:
            reader.notes.append(f"{present[key]}: skipped, {error}")
    if rows:
        known = pa.concat_tables([known, pa.Table.from_pylist(rows, schema())])
    if rows or gone:
        _keep(path, known)
    return known, reader.notes


def _present(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files of records by a key that changes when they do; a publication's has its age and size."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(packed.SUFFIX):
                state = entry.stat()
                yield f"{entry.name} {state.st_mtime_ns} {state.st_size}", Path(entry.path)
            elif entry.name.endswith(".json") and entry.name != shared.PROTOCOLS:
                yield entry.name, Path(entry.path)


def _row(key: str, record: Record) -> dict[str, Any]:
    cell = record.cell
    return {
        "file": key,
        "name": record.name,
        "suite": cell.suite,
        "version": cell.suite_version,
        "tier": cell.tier,
        "recipe": cell.recipe,
        "steps": cell.steps,
        "model": cell.model,
        "seed": cell.seed,
        "attempt": record.attempt,
        "outcome": record.outcome,
        "started": record.started,
        "host": record.host,
        **{name: record.metrics[name].value for name in HEADLINES if name in record.metrics},
    }


def _read(path: Path) -> pa.Table:
    """The index that was kept; empty where there is none of this form."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.suppress(OSError, pa.ArrowException, ValueError):
        table = pq.read_table(path, partitioning=None)
        if table.schema.equals(schema()):
            return table
    return schema().empty_table()


def _keep(path: Path, table: pa.Table) -> None:
    """Write an index; that it cannot be kept is no failure."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    with contextlib.suppress(OSError):
        files.add(path.parent / ".gitignore", b"*\n")
        replace_file(path, buffer.getvalue())
