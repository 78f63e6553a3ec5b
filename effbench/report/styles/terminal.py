"""Sheets for a terminal of a given width. Names and numbers are never cut: columns are left out until it fits."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence

from effbench.report.sheets import DETAILS, Grid, Sheet, cut_to_detail
from effbench.report.text import numeric_column

GAP = "  "
INTERVAL = re.compile(r" ±[^ ↑↓]*| \[[^]]*\]ˢ?")
BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def page(sheets: Sequence[Sheet], width: int, detail: str = "summary", colour: bool = False) -> str:
    """One grid of each sheet, at most `width` characters wide unless a recipe's name alone is wider."""
    out = io.StringIO()

    def say(text: str, style: str = "") -> None:
        print(f"{style}{text}{PLAIN}" if colour and style else text, file=out)

    for sheet in (cut_to_detail(sheet, detail) for sheet in sheets):
        say(_wrap(sheet.title, width), BOLD)
        say(_wrap(" ".join((sheet.caption, *sheet.protocols)), width), DIM)
        say("")
        for grid in sheet.grids:
            lines, omitted = fit(grid, width)
            say(lines[0], BOLD)
            for line in lines[1:]:
                say(line)
            if omitted:
                say(_wrap(f"Left out at this width: {', '.join(omitted)}.", width), DIM)
        for note in filter(None, (*sheet.notes, sheet.legend)):
            say(_wrap(note, width), DIM)
        say("")
    for suite in dict.fromkeys(sheet.suite for sheet in sheets):
        say(_wrap(_point_to_more([sheet for sheet in sheets if sheet.suite == suite], detail), width))
    return out.getvalue()


def _point_to_more(sheets: Sequence[Sheet], detail: str) -> str:
    """The command for what is not shown."""
    command = f"effbench report suite={sheets[0].suite}"
    others = [name for name in DETAILS if name != detail and any(g.detail == name for s in sheets for g in s.grids)]
    if not others:
        return f"More: {command} --{detail} format=md"
    return f"More: {command} detail=NAME, of {', '.join(others)}; or format=md for all of it"


def fit(grid: Grid, width: int) -> tuple[list[str], list[str]]:
    """Lines of a grid, the header first, and what had to be left out: intervals first, then columns from the right.

    Where not even one column fits beside the names, a name has a line of its own above its numbers.
    """
    columns = list(zip(grid.header, *grid.rows, strict=True))
    short = [tuple(INTERVAL.sub("", cell) for cell in column) for column in columns[1:]]
    omitted: list[str] = []
    if _measure_width(columns) > width and short != columns[1:]:
        columns[1:] = short
        omitted.append("intervals")
    beside = _measure_width(columns[:2]) <= width
    names = columns.pop(0) if not beside else None
    dropped: list[str] = []
    while _measure_width(columns) > width and len(columns) > 1:
        dropped.insert(0, columns.pop()[0])
    lines = _align(columns)
    if names is not None:
        lines = [lines[0], *(line for pair in zip(names[1:], lines[1:], strict=True) for line in pair)]
    return lines, [*omitted, *dropped]


def _measure_width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) for column in columns) + len(GAP) * (len(columns) - 1)


def _align(columns: Sequence[Sequence[str]]) -> list[str]:
    padded = []
    for column in columns:
        width = max(map(len, column))
        right = numeric_column(column[1:])
        padded.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return [GAP.join(line).rstrip() for line in zip(*padded, strict=True)]


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
