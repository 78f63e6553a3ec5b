"""What a name of `effbench compare` stands for: a row, or all rows of a file, a folder or a git revision."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from effbench.core.errors import Usage
from effbench.core.paths import PUBLISHED, RUNS
from effbench.core.usage import named_path, nearest
from effbench.records.packed import SUFFIX
from effbench.records.reader import Reader, read_record
from effbench.records.record import Record, Unreadable
from effbench.records.revisions import SEPARATOR, find_commit, open_revision
from effbench.records.store import Store, latest
from effbench.report.groups import Row, Table, group_records
from effbench.report.pages import check_suite_name, load, select_records
from effbench.report.text import LONGEST

FEW = 20  # names that are worth listing
SEE = "; `effbench report` shows the recipes that have records"
NEITHER = "is neither a record file nor a recipe with records, nor a folder or a git revision with results"


@dataclasses.dataclass(frozen=True)
class Where:
    """Where names are looked up, and which records count."""

    results: str | None = None  # folder of records; by default runs, of revisions the published ones
    suite: str | None = None
    tier: str | None = None
    model: str | None = None

    @property
    def folder(self) -> Path:
        return named_path("results", self.results or RUNS)

    @property
    def history(self) -> Path:
        """The folder that is read at a git revision."""
        if self.results is not None:
            return self.folder.resolve()
        here = Path("results")
        return here.resolve() if here.is_dir() or PUBLISHED is None else PUBLISHED.resolve()

    def select(self, records: Sequence[Record]) -> list[Record]:
        """The last attempts of the records that count. Raises `Usage` where there is none."""
        return select_records(list(latest(records).values()), suite=self.suite, tier=self.tier, model=self.model)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows that one name has, of which one is to be compared."""

    name: str
    found: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Tables:
    """All rows of one place."""

    name: str
    found: tuple[Table, ...]


@contextlib.contextmanager
def open_sides(names: tuple[str, str], where: Where) -> Iterator[tuple[Rows, Rows] | tuple[Tables, Tables]]:
    """What two names stand for, for as long as the context lasts: two rows, or two places with rows.

    Raises `Usage` for a name that stands for nothing, and for a row beside a place.
    """
    check_suite_name(where.suite)
    with contextlib.ExitStack() as stack:
        tables: list[Table] | Usage | None = None  # of the folder in which rows are looked up
        sides: list[Rows | Tables] = []
        for name in names:
            side = _open_path(name, where)
            if side is None:
                if tables is None:
                    tables = _load_tables(where)
                side = _find_rows(name, tables) or stack.enter_context(_open_revision(name, where))
            sides.append(side if side is not None else _refuse(name, tables, where))
        first, second = sides
        if isinstance(first, Rows) and isinstance(second, Rows):  # noqa: SIM114  types are narrowed one by one
            yield first, second
        elif isinstance(first, Tables) and isinstance(second, Tables):
            yield first, second
        else:
            row, place = sorted(sides, key=lambda side: isinstance(side, Tables))
            raise Usage(
                f"{row.name[:LONGEST]} is a row and {place.name[:LONGEST]} holds many: compare two rows, or two "
                f"folders, files or revisions with rows={row.name[:LONGEST]}"
            )


def _open_path(name: str, where: Where) -> Rows | Tables | None:
    """A record's file, a publication, a folder of results; None for what is none of these. Raises `Usage`."""
    path = Path(name)
    try:
        if path.is_dir():
            return _open_folder(name, path, where)
        if not path.is_file():
            return None
        if path.suffix == SUFFIX:
            return _gather(name, Reader(path.parent).read_file(path), where)
        return Rows(name, (Row((read_record(path),)),))
    except OSError:
        return None  # no file can have such a name
    except (Unreadable, ValueError) as error:
        raise Usage(f"{path}: {error}") from None


def _open_folder(name: str, folder: Path, where: Where) -> Tables | None:
    """A folder with results, or that of one version of a suite; None for others."""
    if Store(folder).folders():
        return _gather(name, load(folder, where.suite), where)
    records = Reader(folder).read() if (folder.parent.parent / "environments").is_dir() else []
    return _gather(name, records, where) if records else None


def _gather(name: str, records: Sequence[Record], where: Where) -> Tables:
    return Tables(name, tuple(group_records(where.select(records))))


def _load_tables(where: Where) -> list[Table] | Usage:
    """The tables in which rows are looked up, or why there is none."""
    try:
        return group_records(where.select(load(where.folder, where.suite)))
    except Usage as error:
        return error


def _find_rows(name: str, tables: list[Table] | Usage) -> Rows | None:
    rows = [] if isinstance(tables, Usage) else [row for table in tables for row in table.rows]
    found = tuple(row for row in rows if name and name in (row.recipe, row.steps))
    return Rows(name, found) if found else None


@contextlib.contextmanager
def _open_revision(name: str, where: Where) -> Iterator[Tables | None]:
    """The results at a git revision, `REVISION` or `REVISION:FOLDER`; None for what is none. Raises `Usage`."""
    near = next(path for path in (where.history, *where.history.parents) if os.path.isdir(path))
    folder = name.partition(SEPARATOR)[2]
    near = Path.cwd() if folder else near
    commit = find_commit(name, near)
    if commit is None:
        yield None
        return
    with open_revision(commit, named_path("folder", folder).resolve() if folder else where.history) as copy:
        if not Store(copy).folders(where.suite):
            what = f"records of suite {where.suite}" if where.suite else "records"
            raise Usage(f"{name[:LONGEST]}: no {what} at this revision; name the folder as {commit[:9]}:FOLDER")
        yield _gather(f"{name} ({commit[:9]})", load(copy, where.suite), where)


def _refuse(name: str, tables: list[Table] | Usage | None, where: Where) -> Rows:
    """Raise `Usage`: why a name stands for nothing, with the nearest that does."""
    shown = name[:LONGEST]
    if tables is None or isinstance(tables, Usage):
        raise Usage(f"{shown!r} {NEITHER}: {tables or where.folder}")
    known = {label for table in tables for row in table.rows for label in (row.recipe, row.steps) if label}
    hint = nearest(shown, known) if len(known) <= FEW or get_close_matches(shown, known) else SEE
    raise Usage(f"{shown!r} {NEITHER}{hint}")
