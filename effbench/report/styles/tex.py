"""Sheets as LaTeX, for the package booktabs."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.report.sheets import Sheet
from effbench.report.text import SUPERSCRIPTS, numeric_column

CHARACTERS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_",
    "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "[": "{[}", "]": "{]}", "±": r"$\pm$", "×": r"$\times$", "–": "--",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "ˢ": r"\textsuperscript{s}",
    **{chr(mark): rf"\textsuperscript{{{chr(digit)}}}" for digit, mark in SUPERSCRIPTS.items()},
}  # fmt: skip


def page(sheets: Sequence[Sheet]) -> str:
    """A whole file to be included."""
    return "\n\n".join(["% Needs \\usepackage{booktabs}.", *map(_write_tables, sheets)]) + "\n"


def escape(text: str) -> str:
    """Plain text so that LaTeX sets it as it is."""
    return "".join(CHARACTERS.get(character, character) for character in text)


def _write_tables(sheet: Sheet) -> str:
    if not sheet.grids:
        return escape(" ".join((f"{sheet.title}:", *sheet.notes)))
    tables = []
    for grid in sheet.grids:
        align = "".join("r" if numeric_column(column) else "l" for column in zip(*grid.rows, strict=True))
        header, *body = (" & ".join(map(escape, line)) + r" \\" for line in (grid.header, *grid.rows))
        first = grid is sheet.grids[0]
        caption = " ".join((f"{sheet.title}: {grid.title}.", *((sheet.caption, *sheet.protocols) if first else ())))
        notes = [*sheet.notes, sheet.legend] if first else sheet.notes
        lines = [r"\begin{table}", r"\centering\footnotesize", rf"\caption{{{escape(caption)}}}"]
        lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
        lines += [r"\end{tabular}", *(rf"\par {escape(note)}" for note in notes), r"\end{table}"]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)
