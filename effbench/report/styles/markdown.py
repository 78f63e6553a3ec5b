"""Sheets as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.report.glossary import write_list
from effbench.report.sheets import Sheet, point_to_more
from effbench.report.text import markdown, markdown_table


def page(sheets: Sequence[Sheet], detail: str | None = None) -> str:
    """A whole page; where its sheets are cut to one detail, a line at its end says how to get the rest."""
    parts = list(map(block, sheets))
    if detail is not None:
        parts.append(markdown(point_to_more(sheets, detail)))
    if names := {name for sheet in sheets for name in sheet.metrics}:
        parts += ["**Metrics**, as the CSV and the records name them:", write_list(names)]
    return "\n\n".join(parts) + "\n"


def block(sheet: Sheet) -> str:
    """One sheet; titles of grids where there are several."""
    parts = [f"**{markdown(sheet.title)}.** {markdown(' '.join((sheet.caption, *sheet.protocols)))}"]
    for grid in sheet.grids:
        if len(sheet.grids) > 1:
            parts.append(f"*{markdown(grid.title)}*")
        parts.append(markdown_table(grid.header, [[markdown(cell) for cell in row] for row in grid.rows]))
    return "\n\n".join([*parts, *map(markdown, filter(None, (*sheet.notes, sheet.legend, sheet.advice)))])
