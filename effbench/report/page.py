"""One page in HTML for a suite or for all: tables, plots of fronts, and every record that a number stands on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from effbench.core.plain import plain
from effbench.records.definitions import DEFINITIONS
from effbench.records.record import Record
from effbench.report.choice import ALL, Choice
from effbench.report.columns import DETAILS, Column
from effbench.report.differences import Kept
from effbench.report.folder import name_file, need, open_folder, write_file
from effbench.report.fronts import FEWEST, Fronts
from effbench.report.groups import Row, Table
from effbench.report.metrics import find_definition, get_title
from effbench.report.pictures import make_picture, trace_front
from effbench.report.sheets import Grid, Name, Sheet, Stale, make_sheets
from effbench.report.text import DASH, numeric_column

EVERYTHING = "all suites"
LEFT_OUT = ("layers",)  # of a record's log: thousands of numbers, which the record itself has


@dataclasses.dataclass(frozen=True)
class Heading:
    """A column of the page's table."""

    title: str
    detail: str
    metric: str  # what a number of it links to; empty where it shows none
    meaning: str
    numeric: bool


@dataclasses.dataclass(frozen=True)
class Entry:
    """A number or a text of the table."""

    text: str
    key: float | str  # to sort by


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table."""

    name: Name
    number: int  # of the row in the page's data
    outcome: str
    entries: tuple[Entry, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One table of the page."""

    sheet: Sheet
    headings: tuple[Heading, ...]
    lines: tuple[Line, ...]
    details: Mapping[str, str]  # those that it has, with their titles

    @property
    def caption(self) -> tuple[str, str]:
        """What, where and what became of it, and then everything else that has to be known of the measurement."""
        first, _, more = self.sheet.caption.partition(". ")
        return first.removesuffix(".") + ".", " ".join(filter(None, (more, *self.sheet.protocols)))


def write_page(
    tables: Sequence[Table],
    folder: Path,
    suite: str | None = None,
    kept: Kept | None = None,
    stale: Stale | None = None,
    choice: Choice = ALL,
) -> Path:
    """Write the page of some tables to a folder, as `<suite>.html`, or of all suites as `all-suites.html`.

    Raises `Usage` where a package is missing or the file cannot be written.
    """
    need("jinja2", "format=html")
    need("plotly", "format=html")
    from effbench.report.styles import html

    open_folder(folder)
    title = suite or EVERYTHING
    sections, data = make_page(tables, kept, stale, choice)
    path = folder / name_file(title, "html")
    write_file(path, html.render(title, sections, data))
    return path


def make_page(
    tables: Sequence[Table], kept: Kept | None = None, stale: Stale | None = None, choice: Choice = ALL
) -> tuple[list[Section], dict[str, Any]]:
    """What the page says: its tables, and as plain values the records, definitions and plots behind them."""
    by_suite: dict[str, list[Table]] = {}
    for table in tables:
        by_suite.setdefault(table.cell.suite, []).append(table)
    book, sections, plots = Book(), [], []
    for group in by_suite.values():
        shown = [table for table in group if choice.select_rows(table)]
        for table, sheet in zip(shown, make_sheets(group, kept, stale, choice), strict=True):
            sections.append(_make_section(sheet, book))
            plots.append(_make_plots(dataclasses.replace(table, rows=sheet.rows)))
    return sections, {**book.close(), "plots": plots}


class Book:
    """The records of a page, each once; texts and environments that many share are held once, too."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._records: list[dict[str, Any]] = []
        self._shared: dict[str, dict[str, int]] = {"protocols": {}, "environments": {}}
        self._metrics: dict[str, int | None] = {}

    def add(self, row: Row, title: str) -> int:
        """Take a row and its records; returns the row's number."""
        first = len(self._records)
        self._records.extend(map(self._describe, row.records))
        self._rows.append({"name": row.recipe, "table": title, "records": [*range(first, len(self._records))]})
        return len(self._rows) - 1

    def close(self) -> dict[str, Any]:
        """All of it as plain values; numbers that JSON has not are texts."""
        return {
            "rows": self._rows,
            "records": self._records,
            "protocols": [*self._shared["protocols"]],
            "environments": [msgspec.json.decode(text) for text in self._shared["environments"]],
            "definitions": [[d.pattern, d.unit, d.better, d.meaning] for d in DEFINITIONS],
            "metrics": self._metrics,
        }

    def _describe(self, record: Record) -> dict[str, Any]:
        for name in record.metrics:
            definition = find_definition(name)
            self._metrics.setdefault(name, None if definition is None else DEFINITIONS.index(definition))
        cell = dataclasses.asdict(record.cell)
        environment = msgspec.json.encode(plain(record.environment), order="sorted").decode()
        return {
            "name": record.name,
            "cell": plain(cell | {"identity": record.cell.identity}),
            "outcome": record.outcome,
            "reason": record.reason,
            "traceback": record.traceback,
            "attempt": record.attempt,
            "simulated": record.simulated,
            "started": record.started,
            "seconds": _plain_number(record.seconds),
            "environment": self._share("environments", environment),
            "metrics": {
                name: [*map(_plain_number, (one.value, one.low, one.high)), one.n, plain(dict(one.findings))]
                for name, one in record.metrics.items()
            },
            "protocols": {name: self._share("protocols", text) for name, text in record.protocols.items()},
            "kernels": plain(record.kernels),
            "facts": plain(record.facts),
            "log": plain({name: value for name, value in record.log.items() if name not in LEFT_OUT}),
        }

    def _share(self, kind: str, text: str) -> int:
        known = self._shared[kind]
        return known.setdefault(text, len(known))


def list_measured(sections: Iterable[Section]) -> list[str]:
    """All metrics of the page, each once."""
    return [*dict.fromkeys(name for section in sections for name in section.sheet.metrics)]


def _make_section(sheet: Sheet, book: Book) -> Section:
    columns = [(grid, at) for grid in sheet.grids for at in range(len(grid.shown))]
    headings = tuple(_make_heading(grid, at) for grid, at in columns)
    lines = tuple(
        Line(
            name=name,
            number=book.add(row, sheet.title),
            outcome=row.worst.outcome,
            entries=tuple(
                Entry(grid.rows[number][at + 1], _get_key(row, grid.shown[at], grid.rows[number][at + 1]))
                for grid, at in columns
            ),
        )
        for number, (row, name) in enumerate(zip(sheet.rows, sheet.names, strict=True))
    )
    details = {grid.detail: DETAILS[grid.detail].partition(":")[0].partition(";")[0] for grid in sheet.grids}
    return Section(sheet, headings, lines, details)


def _make_heading(grid: Grid, at: int) -> Heading:
    column, cells = grid.shown[at], [row[at + 1] for row in grid.rows]
    metric = column.metrics[0] if column.metrics else ""
    return Heading(column.header, grid.detail, metric, column.explain(), numeric_column(cells))


def _get_key(row: Row, column: Column, text: str) -> float | str:
    """What an entry is sorted by: the number as measured where it shows one, and nothing for a dash."""
    estimate = row.estimate(column.metrics[0]) if column.metrics else None
    if text == DASH:
        return ""
    return text if estimate is None else estimate.value


def _make_plots(table: Table) -> dict[str, Any]:
    """Every pair of a quality and a cost that is worth a plot, and titles for choosing among them."""
    fronts = Fronts(table)
    found = [fronts.find(x, y) for y in fronts.qualities for x in fronts.costs]
    shown = [front for front in found if len(front.points) >= FEWEST]
    return {
        "pictures": [msgspec.to_builtins(one) | {"corners": trace_front(one)} for one in map(make_picture, shown)],
        "x": {front.x: get_title(front.x) for front in shown},
        "y": {front.y: get_title(front.y) for front in shown},
    }


def _plain_number(value: float | None) -> float | str | None:
    """A number as JSON can hold it: infinite, not a number and missing stay three things."""
    return value if value is None or math.isfinite(value) else f"{value:g}"
