"""Sheets: everything that is said about a table, in words and numbers but in no format yet."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effbench.records.record import OUTCOMES, Record
from effbench.report.differences import LEVEL, Kept, Test, compute_tests
from effbench.report.groups import Row, Table, find_differing_settings, get_machine
from effbench.report.metrics import (
    TASKS,
    get_family,
    get_limits,
    get_scale,
    get_title,
    natural_key,
    select,
    select_perplexities,
    select_tasks,
)
from effbench.report.text import DASH, bytes_text, one_line, rounded, superscript, with_interval

Show = Callable[[Row], str]
Stale = Callable[[Record], bool]  # whether a record was measured by another source than the present one

CHOSEN = ("threads", "dtype", "limit")  # settings that every caption has
DETAILS = {
    "summary": "Size and quality",
    "quality": "Quality in detail",
    "speed": "Speed, as a ratio to the baseline of the same run",
    "memory": "Memory; peaks are above what was resident before",
    "compute": "Operations and energy",
    "methods": "Methods and the cost of applying them",
    "published": "Beside the published results",
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows and columns of one kind: the name of the recipe, then columns with the most important first."""

    detail: str  # a key of DETAILS
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def title(self) -> str:
        return DETAILS[self.detail]


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
    metrics: tuple[str, ...] = ()  # names of all that was measured, to be defined below the tables


def make_sheets(tables: Sequence[Table], kept: Kept | None = None, stale: Stale | None = None) -> list[Sheet]:
    """The sheets of one page, no two of them under one title.

    Tests of rows that are in `kept` are not computed anew. With `stale`, captions say how many rows are of an
    older source.
    """
    differing = find_differing_settings(tables) if len(tables) > 1 else []
    titles = _make_titles(tables)
    return [
        _make_sheet(table, name, _write_caption(table, differing, stale), compute_tests(table, kept))
        for table, name in zip(tables, titles, strict=True)
    ]


def cut_to_detail(sheet: Sheet, detail: str) -> Sheet:
    """The sheet with the grid of one detail alone, and the protocol of the perplexity that every summary has.

    Where nothing of the detail was measured, a note instead of the grid says so, and what there is.
    """
    cut = dataclasses.replace(sheet, protocols=sheet.protocols[:1], metrics=())
    if grids := tuple(grid for grid in sheet.grids if grid.detail == detail):
        return dataclasses.replace(cut, grids=grids)
    present = ", ".join(grid.detail for grid in sheet.grids)
    note = f"Nothing was measured of detail={detail} ({DETAILS[detail]}); there is detail={present}."
    return dataclasses.replace(cut, grids=(), notes=(note,), legend="")


def _make_sheet(table: Table, name: str, caption: str, tests: Mapping[tuple[str, str], Test]) -> Sheet:
    footnotes: dict[str, int] = {}
    names = [_name_row(row, footnotes) for row in table.rows]
    grids: list[Grid] = []
    for detail, columns in _choose_columns(table, tests).items():
        cells = {header: [show(row) for row in table.rows] for header, show in columns.items()}
        shown = {header: column for header, column in cells.items() if any(cell != DASH for cell in column)}
        if shown or not grids:
            grids.append(Grid(detail, ("recipe", *shown), tuple(zip(names, *shown.values(), strict=True))))
    notes = tuple(f"{superscript(number)} {text}" for text, number in footnotes.items())
    legend = _write_legend(table, bool(tests))
    return Sheet(table.cell.suite, name, caption, _list_protocols(table), tuple(grids), notes, legend, table.measured)


# ---- columns ------------------------------------------------------------------------------------


def _choose_columns(table: Table, tests: Mapping[tuple[str, str], Test]) -> dict[str, dict[str, Show]]:
    """The columns of each detail, by header."""
    measured = functools.partial(_show_estimate, tests)
    ppls = select_perplexities(table.measured)
    speeds = sorted(select(table.measured, "speed", "ratio"), key=lambda name: not name.startswith("prefill"))
    operations = [*select(table.measured, "compute"), *select(table.measured, "energy", "J")]

    summary: dict[str, Show] = {"bits": _show_value("bits_per_weight", "{:.2f}".format), "stored": _show_stored}
    if "sparsity_asked" in table.measured:
        summary["zeros, %"] = _show_sparsity
    summary |= {get_title(name): measured(name) for name in ppls[:1]}
    summary |= {get_title(name): measured(name) for name in ("kl_nats_per_token", "top1_agreement", TASKS)}
    for phase in ("prefill", "decode"):
        summary |= {
            f"{phase}, ×": _show_speed(name) for name in [name for name in speeds if name.startswith(phase)][:1]
        }

    peaks = table.metrics("^(score|generate)_peak_.*_bytes$")
    sizes = {"weights": "weight_bytes", "metadata": "metadata_bytes", "resident": "resident_bytes"}
    methods: dict[str, Show] = {
        "type": lambda row: row.fact("type"),
        "calibration data": lambda row: row.fact("calibration_data"),
        "weight update": lambda row: row.fact("weight_update"),
        "seeds": lambda row: str(len(row.records)),
        "apply, s": _show_value("apply_seconds", rounded),
        "calibration tokens": _show_value("calibration_tokens", "{:,.0f}".format),
    }
    methods |= {get_title(name): _show_value(name, bytes_text) for name in table.metrics("^apply_peak_.*_bytes$")}
    if any(row.recipe != row.steps for row in table.rows if not row.is_baseline):
        methods |= {"steps": lambda row: row.steps or DASH}
    return {
        "summary": summary,
        "quality": {get_title(name): measured(name) for name in [*ppls[1:], *select_tasks(table.measured)]},
        "speed": {get_title(name): _show_speed(name) for name in speeds},
        "memory": {header: _show_value(name, bytes_text) for header, name in sizes.items()}
        | {get_title(name): _show_value(name, bytes_text) for name in peaks},
        "compute": {get_title(name): measured(name) for name in sorted(operations, key=natural_key)},
        "methods": methods,
    }


def _show_estimate(tests: Mapping[tuple[str, str], Test], metric: str) -> Show:
    """A value with its interval, and an arrow where the row differs from the baseline beyond chance."""
    scale, limits = get_scale(metric), get_limits(metric)
    digits = (
        4 if get_family(metric) == "perplexity" else 3
    )  # rows differ by less than their own intervals: they are paired

    def show(row: Row) -> str:
        test = tests.get((row.recipe, metric))
        arrow = "" if test is None or test.p > LEVEL else " ↑" if test.value > 0 else " ↓"
        return with_interval(row.estimate(metric), scale, digits, limits) + arrow

    return show


def _show_value(metric: str, text: Callable[[float], str]) -> Show:
    """A value alone."""

    def show(row: Row) -> str:
        estimate = row.estimate(metric)
        return DASH if estimate is None else text(estimate.value)

    return show


def _show_speed(metric: str) -> Show:
    """A speed; a row that only simulates has none."""
    limits = get_limits(metric)
    return lambda row: DASH if row.simulated else with_interval(row.estimate(metric), limits=limits)


def _show_stored(row: Row) -> str:
    size, ratio = row.estimate("stored_bytes"), row.estimate("compression")
    return DASH if size is None else bytes_text(size.value) + (f" ({ratio.value:.2f}×)" if ratio else "")


def _show_sparsity(row: Row) -> str:
    """The share of zeros of the linears, and in brackets that which was asked for."""
    found, asked = row.estimate("sparsity"), row.estimate("sparsity_asked")
    return DASH if found is None else f"{100 * found.value:.1f}" + (f" ({100 * asked.value:g})" if asked else "")


def _name_row(row: Row, footnotes: dict[str, int]) -> str:
    """The recipe with footnotes: its caveats, and where it is not simply `ok`, what became of it and why."""

    def mark(*texts: str) -> str:
        return " ".join(superscript(footnotes.setdefault(text, len(footnotes) + 1)) for text in texts)

    name = row.recipe + mark(*row.caveats) + " (simulated)" * row.simulated + " (densified)" * row.densified
    worst = row.worst
    if worst.outcome == "ok":
        return name
    text = f"{worst.outcome}: {one_line(worst.reason)[:300] or 'no reason given'}"
    if len(row.records) > 1:
        text = f"{sum(one.outcome != 'ok' for one in row.records)} of {len(row.records)} seeds, {text}"
    return f"{name}: {worst.outcome}{mark(text)}"


# ---- words --------------------------------------------------------------------------------------


def _make_titles(tables: Sequence[Table]) -> list[str]:
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
        parts.append(f"{old} of {len(table.rows)} rows were measured by an older source.")
    if table.older:
        left = "1 record" if table.older == 1 else f"{table.older} records"
        parts.append(f"{left} of an older source, model or data left out.")
    if kernels := sorted({name for record in records for backends in record.kernels.values() for name in backends}):
        parts.append(f"Packed weights computed by the backend {', '.join(kernels)}.")
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


def _write_legend(table: Table, tested: bool) -> str:
    """What the marks mean, as far as they can occur."""
    parts = [
        "±: half of the 95 % interval over items or windows; [a–b]: its bounds, where ± would leave what is possible; "
        "ˢ: over seeds, for two of them [a–b]ˢ is their range; –: not measured."
    ]
    if tested:
        parts.append("↑ ↓: differs from the baseline, paired by item, at 5 % after Holm over the table.")
    if speeds := select(table.measured, "speed", "ratio"):
        first = get_title(speeds[0]).partition(" ")[2]
        parts.append(f"Speed: the baseline of the same run is 1; b: batch, c: context, {first} unless named.")
    if "sparsity_asked" in table.measured:
        parts.append("Zeros: of the linears but the head, in brackets what was asked for; rounding makes some too.")
    if any(row.simulated for row in table.rows):
        parts.append("Simulated: computes like the compressed form without being stored as it, so it has no speed.")
    if any(row.densified for row in table.rows):
        parts.append("Densified: a merge filled the zeros that pruning had made.")
    if any(row.elsewhere for row in table.rows):
        parts.append("The baseline was measured on another host: only what does not depend on the host is shown.")
    return " ".join(parts)
