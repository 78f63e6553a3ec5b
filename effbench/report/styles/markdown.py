"""Sheets as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.report.sheets import Sheet
from effbench.report.text import markdown, markdown_table


def page(sheets: Sequence[Sheet], note: str) -> str:
    """A whole page; `note` says how it was made."""
    return "\n\n".join([f"<!-- {note} -->", *map(block, sheets)]) + "\n"


def block(sheet: Sheet) -> str:
    """One sheet; titles of grids where there are several."""
    parts = [f"**{markdown(sheet.title)}.** {markdown(' '.join((sheet.caption, *sheet.protocols)))}"]
    for grid in sheet.grids:
        if len(sheet.grids) > 1:
            parts.append(f"*{markdown(grid.title)}*")
        parts.append(markdown_table(grid.header, [[markdown(cell) for cell in row] for row in grid.rows]))
    return "\n\n".join([*parts, *map(markdown, (*sheet.notes, sheet.legend))])
