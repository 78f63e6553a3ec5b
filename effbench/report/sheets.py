"""Sheets: everything that is said about a table, in words and numbers but in no format yet."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from effbench.records.record import OUTCOMES, Record
from effbench.report.best import find_best
from effbench.report.choice import ALL, Choice
from effbench.report.columns import DETAILS, PHASES, UNMET, Column, Tests, make_columns
from effbench.report.differences import LEVEL, Kept, compute_tests
from effbench.report.fronts import DETAIL as FRONT
from effbench.report.fronts import LEGEND, make_front_columns
from effbench.report.groups import Row, Table, find_differing_settings, get_machine
from effbench.report.metrics import get_title, select, select_headlines, select_perplexities
from effbench.report.text import DASH, one_line, superscript
from effbench.stats.intervals import Z

Stale = Callable[[Record], bool]  # whether a record was measured by another source than the present one

INTERVAL = re.compile(r" ±[^ ↑↓]*| \[[^]]*\]ˢ?")
MARKS = (
    "±: the longer half of the 95 % interval over items or windows; [a–b]: its bounds, where ± would mislead; "
    "ˢ: over seeds, for two of them [a–b]ˢ is their range; a value alone: seeds agree, or too few timings for an "
    "interval; –: not measured."
)
OF_BEST = " Bold: better than every other row but the baseline, paired by item, at 5 % after Holm over these."
ARROWS = "↑ ↓: differs from the baseline, paired by item, at 5 % after Holm over the table."
MUCH = 0.5  # of a trained product, which a row that has lost it says
SOON = (2, 3, 4, 6, 8)  # times the seeds or items that somebody may still measure
MOST_ADVICE = 3
OF_FRONTS = f" Fronts: {LEGEND}"  # at the end of the legend
CHOSEN = ("threads", "dtype", "limit")  # settings that every caption has


@dataclasses.dataclass(frozen=True)
class Name:
    """What stands in the first column: the recipe, what is to be known of it, and what became of it."""

    recipe: str
    notes: tuple[int, ...] = ()  # numbers of footnotes: caveats of its methods
    remarks: str = ""  # in brackets
    outcome: str = ""  # where not simply `ok`
    reason: int = 0  # number of the footnote that says why

    def __str__(self) -> str:
        name = self.recipe + " ".join(map(superscript, self.notes)) + self.remarks
        return f"{name}: {self.outcome}{superscript(self.reason)}" if self.outcome else name


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows and columns of one kind: the name of the recipe, then columns with the most important first."""

    detail: str  # a key of DETAILS
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()  # row and column of cells that are surely the best of their column
    shown: tuple[Column, ...] = ()  # what stands behind the header, but for its first

    @property
    def title(self) -> str:
        return DETAILS[self.detail]

    @property
    def columns(self) -> list[tuple[str, ...]]:
        """The cells of each column below its header."""
        return list(zip(self.header, *self.rows, strict=True))


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Everything said about one table."""

    suite: str
    title: str
    caption: str
    protocols: tuple[str, ...]  # how each perplexity was measured, that of the held-out tokens first
    grids: tuple[Grid, ...]
    notes: tuple[str, ...]  # footnotes of the names in the first column
    legend: str
    advice: str = ""  # what to measure again first
    metrics: tuple[str, ...] = ()  # names of all that was measured, to be defined below the tables
    details: tuple[str, ...] = ()  # all for which there are numbers, shown or not
    omitted: int = 0  # rows of the table that are not shown
    rows: tuple[Row, ...] = ()  # those that are
    names: tuple[Name, ...] = ()  # of these


def make_sheets(
    tables: Sequence[Table],
    kept: Kept | None = None,
    stale: Stale | None = None,
    choice: Choice = ALL,
    mark_best: bool = False,
) -> list[Sheet]:
    """The sheets of one page, no two of them under one title; tables without a chosen row or column have none.

    Tests of rows that are in `kept` are not computed anew; they count all rows, chosen or not. With `stale`, captions
    say how many rows are of an older source.
    """
    differing = find_differing_settings(tables) if len(tables) > 1 else []
    titles = make_titles(tables)
    sheets = (
        _make_sheet(
            table, rows, choice, name, _write_caption(table, differing, stale), compute_tests(table, kept), mark_best
        )
        for table, name in zip(tables, titles, strict=True)
        if (rows := choice.select_rows(table))
    )
    return [sheet for sheet in sheets if sheet.grids]


def cut_to_detail(sheet: Sheet, detail: str) -> Sheet:
    """The sheet with the grid of one detail alone, and the protocol of the perplexity that every summary has.

    Where nothing of the detail was measured, a note instead of the grid says so, and what there is.
    """
    legend = sheet.legend if detail == FRONT else sheet.legend.removesuffix(OF_FRONTS)
    cut = dataclasses.replace(sheet, protocols=sheet.protocols[:1], metrics=(), legend=legend)
    if grids := tuple(grid for grid in sheet.grids if grid.detail == detail):
        return dataclasses.replace(cut, grids=grids)
    note = f"Nothing was measured of detail={detail} ({DETAILS[detail]}); there is detail={', '.join(sheet.details)}."
    return dataclasses.replace(cut, grids=(), notes=(note,), legend="")


def point_to_more(sheets: Sequence[Sheet], detail: str) -> str:
    """One line: the command for what is not shown of the sheets of a suite."""
    command = f"effbench report suite={sheets[0].suite}"
    others = [name for name in DETAILS if name != detail and any(name in sheet.details for sheet in sheets)]
    if not others:
        return f"More: {command}{' --published' if detail == 'published' else ''} format=md"
    return f"More: {command} detail=NAME, of {', '.join(others)}; or format=md for all of it"


def narrow(grid: Grid, width: int, gap: int) -> tuple[Grid, list[str]]:
    """A grid that is at most so many characters wide, and what was left out of it: intervals first, then columns from
    the right, but never the first two of them.
    """
    columns, omitted = grid.columns, list[str]()
    short = [columns[0], *(tuple(INTERVAL.sub("", cell) for cell in column) for column in columns[1:])]
    if measure_width(columns, gap) > width and short != columns:
        columns = short
        omitted.append("intervals")
    dropped: list[str] = []
    while measure_width(columns, gap) > width and len(columns) > 2:
        dropped.insert(0, columns.pop()[0])
    header, *rows = zip(*columns, strict=True)
    return dataclasses.replace(grid, header=header, rows=tuple(rows)), omitted + dropped


def measure_width(columns: Sequence[Sequence[str]], gap: int) -> int:
    """Characters of a line of columns with a gap between any two."""
    return sum(max(map(len, column)) for column in columns) + gap * (len(columns) - 1)


def _make_sheet(
    table: Table, rows: Sequence[Row], choice: Choice, name: str, caption: str, tests: Tests, mark_best: bool
) -> Sheet:
    footnotes: dict[str, int] = {}
    names = tuple(_name_row(row, footnotes) for row in rows)
    made = make_columns(table.measured, placed=any(map(get_machine, table.records)))
    made |= {FRONT: make_front_columns(table), "chosen": choice.select_columns(table.measured)}
    grids: list[Grid] = []
    for detail in (detail for detail in DETAILS if detail in made):
        by_header = {column.header: column for column in made[detail]}
        cells = {header: [column.show(row, tests) for row in rows] for header, column in by_header.items()}
        shown = {header: column for header, column in cells.items() if any(cell != DASH for cell in column)}
        if shown or detail == "summary":
            lines = tuple(zip(map(str, names), *shown.values(), strict=True))
            columns = tuple(by_header[header] for header in shown)
            best = frozenset(_find_best(rows, columns)) if mark_best else frozenset()
            grids.append(Grid(detail, ("recipe", *shown), lines, best, columns))
    details = tuple(grid.detail for grid in grids if grid.detail != "chosen")
    if choice.columns:
        grids = [grid for grid in grids if grid.detail == "chosen"]
    return Sheet(
        suite=table.cell.suite,
        title=name,
        caption=caption,
        protocols=_list_protocols(table),
        grids=tuple(grids),
        notes=tuple(f"{superscript(number)} {text}" for text, number in footnotes.items()),
        legend=_write_legend(table, rows, bool(tests))
        + OF_FRONTS * any(grid.detail == FRONT for grid in grids)
        + OF_BEST * any(grid.best for grid in grids),
        advice=_advise(table, tests),
        metrics=table.measured,
        details=details,
        omitted=len(table.rows) - len(rows),
        rows=tuple(rows),
        names=names,
    )


def _find_best(rows: Sequence[Row], columns: Sequence[Column]) -> Iterator[tuple[int, int]]:
    """Row and column of the cells that are surely the best of their column, by what the column shows first."""
    for place, column in enumerate(columns, 1):
        best = find_best(rows, column.metrics[0]) if column.metrics else None
        if best is not None:
            yield list(rows).index(best), place


# ---- rows ---------------------------------------------------------------------------------------


def _name_row(row: Row, footnotes: dict[str, int]) -> Name:
    """The recipe with footnotes: its caveats, and where it is not simply `ok`, what became of it and why."""

    def mark(text: str) -> int:
        return footnotes.setdefault(text, len(footnotes) + 1)

    notes = tuple(map(mark, (*row.caveats, *_tell_lost(row))))
    name = Name(row.recipe, notes, " (simulated)" * row.simulated + " (densified)" * row.densified)
    worst = row.worst
    if worst.outcome == "ok":
        return name
    text = f"{worst.outcome}: {one_line(worst.reason)[:300] or 'no reason given'}"
    if len(row.records) > 1:
        text = f"{sum(one.outcome != 'ok' for one in row.records)} of {len(row.records)} seeds, {text}"
    return dataclasses.replace(name, outcome=worst.outcome, reason=mark(text))


def _tell_lost(row: Row) -> Iterator[str]:
    """What rounding the merged weights took of what a fit had learned, where that is much of it."""
    lost = row.estimate("merge_lost")
    if lost is not None and lost.value >= MUCH:
        yield f"merged and rounded again, with an error of {100 * lost.value:.0f} % of what was trained"


# ---- words --------------------------------------------------------------------------------------


def _advise(table: Table, tests: Tests) -> str:
    """What to measure again first: rows whose difference from the baseline more seeds or items would soon settle."""
    if not tests:
        return ""
    if max(len(row.records) for row in table.rows) == 1:
        return "Replicate first: other seeds. Of one seed nobody sees what calibration, training and chance add."
    found: list[tuple[int, str]] = []
    for metric in select_headlines(table.measured):
        for row in table.rows[1:]:
            test = tests.get((row.recipe, metric))
            if test is None or test.p <= LEVEL or test.spread is None or test.spread.runs == 1:
                continue
            spread, title = test.spread, get_title(metric).partition(",")[0]
            for times in SOON:
                more = {"seeds": times * spread.runs, "items": round(times * spread.n)}
                settled = [what for what in more if abs(test.value) >= Z * math.sqrt(spread.foretell(**{what: times}))]
                if settled:
                    what = " or ".join(f"{more[one]} {one}" for one in settled)
                    found.append((times, f"{row.recipe} ({title}: {what})"))
                    break
    if not found:
        return ""
    first = [text for _, text in sorted(found)[:MOST_ADVICE]]
    return (
        f"Replicate first: {'; '.join(first)}. So many would set it apart from the baseline, if the difference stays."
    )


def make_titles(tables: Sequence[Table]) -> list[str]:
    """A title for each table; where two would share one, each adds what sets it apart."""
    plain = [_make_title(table) for table in tables]
    titles = []
    for table, name in zip(tables, plain, strict=True):
        others = [other for other, same in zip(tables, plain, strict=True) if same == name]
        cell, apart = table.cell, []
        if len({other.cell.data for other in others}) > 1:
            apart.append(f"data {cell.data}")
        apart += [_name_setting(cell.settings, setting) for setting in find_differing_settings(others)]
        if len({other.host for other in others}) > 1:
            apart.append(f"host {table.host or 'unknown'}")
        titles.append(", ".join([name, *apart]))
    return titles


def _make_title(table: Table) -> str:
    cell = table.cell
    return f"{cell.suite} v{cell.suite_version}, {cell.tier} tier, model {cell.model}"


def _name_setting(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name)
    return f"{name} {'default' if value is None else value if isinstance(value, str) else json.dumps(value)}"


def _write_caption(table: Table, differing: Sequence[str], stale: Stale | None) -> str:
    """Where the numbers come from, and the settings that are chosen or differ between the tables of the page."""
    records, cell = table.records, table.cell
    where = [
        next(filter(None, map(get_machine, records)), one_line(cell.settings.get("machine") or "an unknown machine"))
    ]
    chosen = [name for name in CHOSEN if cell.settings.get(name)]
    chosen += [name for name in differing if name not in (*CHOSEN, "machine")]
    where += [_name_setting(cell.settings, name) for name in chosen]
    days = sorted({record.started[:10] for record in records if record.started})
    when = " to ".join(dict.fromkeys((*days[:1], *days[-1:]))) or "no date"
    counts = Counter(record.outcome for record in records)
    outcomes = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
    parts = [f"Data {cell.data}; {', '.join(where)}; {when}; {_count_cells(len(records))}: {outcomes}."]
    if types := sorted({one_line(record.log["model_types"]) for record in records if record.log.get("model_types")}):
        parts.append(f"The model's files hold {'; '.join(types)}.")
    if commits := _list_commits(records):
        parts.append(f"Measured at {commits}.")
    if stale is not None and (old := sum(any(map(stale, row.records)) for row in table.rows)):
        parts.append(f"{old} of {len(table.rows)} rows were measured by an older source, model or data.")
    if table.older:
        left = "1 record" if table.older == 1 else f"{table.older} records"
        parts.append(f"{left} of an older source, model or data left out.")
    ran = sorted({(name, op) for record in records for op, names in record.kernels.items() for name in names})
    for backend, each in itertools.groupby(ran, lambda pair: pair[0]):
        parts.append(f"Kernels by the backend {backend}: {', '.join(op for _, op in each)}.")
    return " ".join(parts)


def _list_protocols(table: Table) -> tuple[str, ...]:
    return tuple(
        f"{get_title(metric).capitalize()}: {protocol}."
        for metric in select_perplexities(table.measured)
        for protocol in sorted({one_line(r.protocols[metric]) for r in table.records if metric in r.protocols})
    )


def _count_cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"


def _list_commits(records: Sequence[Record]) -> str:
    """Commits of the source that measured, the oldest first, and whether a working tree had changes."""
    commits: dict[str, bool] = {}
    for record in sorted(records, key=lambda record: record.started):
        if commit := one_line(record.environment.get("commit") or "")[:9]:
            commits[commit] = commits.get(commit, False) or bool(record.environment.get("dirty"))
    named = [f"{commit}{' with changes' if dirty else ''}" for commit, dirty in commits.items()]
    if not named:
        return ""
    return f"commit{'s' if len(named) > 1 else ''} {', '.join(named)}"


def _write_legend(table: Table, rows: Sequence[Row], tested: bool) -> str:
    """What the marks mean, as far as they can occur."""
    parts = [MARKS]
    if tested:
        parts.append(ARROWS)
    if speeds := [name for name in select(table.measured, "speed", "ratio") if name.startswith(PHASES)]:
        first = get_title(speeds[0]).partition(" ")[2]
        beside = "; in brackets what was timed on this machine" if any(map(get_machine, table.records)) else ""
        noise = "what the baseline's own row is off by is noise"
        parts.append(
            f"Speed: the baseline of the same run is 1, {noise}{beside}; b: batch, c: context, {first} unless named."
        )
    if "sparsity_asked" in table.measured:
        parts.append("Zeros: of the linears but the head, in brackets what was asked for; rounding makes some too.")
    if any(row.found(metric, "not_exercised") for row in rows for metric in table.measured):
        parts.append(f"{UNMET}: what was scored did not meet what the recipe changes; a mean is without such tasks.")
    if any(row.simulated for row in rows):
        parts.append("Simulated: computes like the compressed form without being stored as it, so it has no speed.")
    if speeds and any(row.verdict == "fallback" for row in rows):
        parts.append("Rows whose kernels fell back to a reference have no speed above 1.")
    if any(row.densified for row in rows):
        parts.append("Densified: a merge filled the zeros that pruning had made.")
    if any(row.elsewhere for row in table.rows):
        parts.append("The baseline was measured on another host: only what does not depend on the host is shown.")
    return " ".join(parts)
