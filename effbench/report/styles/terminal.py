"""Sheets for a terminal of a given width. Names and numbers are never cut: columns are left out until it fits."""

from __future__ import annotations

import dataclasses
import io
import textwrap
from collections.abc import Sequence

from effbench.report.sheets import Grid, Sheet, cut_to_detail, measure_width, narrow, point_to_more
from effbench.report.text import numeric_column

GAP = "  "
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
                say(_wrap(f"Left out at this width: {'; '.join(omitted)}.", width), DIM)
        for note in filter(None, (*sheet.notes, sheet.legend, sheet.advice)):
            say(_wrap(note, width), DIM)
        say("")
    for suite in dict.fromkeys(sheet.suite for sheet in sheets):
        say(_wrap(point_to_more([sheet for sheet in sheets if sheet.suite == suite], detail), width))
    return out.getvalue()


def fit(grid: Grid, width: int) -> tuple[list[str], list[str]]:
    """Lines of a grid, the header first, and what had to be left out of it.

    Where not even one column fits beside the names, a name has a line of its own above its numbers.
    """
    shown, omitted = narrow(grid, width, len(GAP))
    if measure_width(shown.columns, len(GAP)) <= width or len(grid.header) < 2:
        return _align(shown.columns), omitted
    numbers = dataclasses.replace(grid, header=("", *grid.header[1:]), rows=tuple(("", *row[1:]) for row in grid.rows))
    shown, omitted = narrow(numbers, width + len(GAP), len(GAP))
    header, *lines = _align(shown.columns[1:])
    return [header, *(line for row, cells in zip(grid.rows, lines, strict=True) for line in (row[0], cells))], omitted


def _align(columns: Sequence[Sequence[str]]) -> list[str]:
    padded = []
    for column in columns:
        width = max(map(len, column))
        right = numeric_column(column[1:])
        padded.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return [GAP.join(line).rstrip() for line in zip(*padded, strict=True)]


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
