"""Sheets as LaTeX, for the package booktabs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from effbench.report.sheets import Grid, Sheet, narrow
from effbench.report.text import SUPERSCRIPTS, numeric_column

CHARACTERS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_",
    "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "[": "{[}", "]": "{]}", "±": r"$\pm$", "×": r"$\times$", "–": "--",
    "●": r"$\bullet$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "ˢ": r"\textsuperscript{s}",
    **{chr(mark): rf"\textsuperscript{{{chr(digit)}}}" for digit, mark in SUPERSCRIPTS.items()},
}  # fmt: skip
CHARACTERS_WIDE = 88  # of a line of footnotesize across the text of an article in one column; a gap takes three
TALL = 40  # rows of one table of a paper; more become several tables
LONG_WORD = 30  # characters of a word from which on it may be broken after a mark
HEAD = r"""% Needs \usepackage{booktabs,graphicx}.
\providecommand{\effbenchfit}[1]{\sbox0{#1}\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi}"""


def page(sheets: Sequence[Sheet]) -> str:
    """A whole file to be included: all columns of every table, made smaller where they are wider than the text."""
    return _join(table for sheet in sheets for table in _write_sheet(sheet))


def write_paper(sheets: Sequence[Sheet]) -> str:
    """Tables for a paper, to be included: columns that a page has no room for are left out, unless they were chosen."""
    return _join(_write_narrow(sheet, grid) for sheet in sheets for grid in sheet.grids)


def escape(text: str) -> str:
    """Plain text so that LaTeX sets it as it is."""
    return "".join(CHARACTERS.get(character, character) for character in text)


def _join(tables: Iterable[str]) -> str:
    return "\n\n".join([HEAD, *tables]) + "\n"


def _write_sheet(sheet: Sheet) -> Iterator[str]:
    """All grids of a sheet; what else there is to say stands below the first, footnotes of names below each."""
    if not sheet.grids:
        yield escape(" ".join((f"{sheet.title}:", *sheet.notes)))
    for grid in sheet.grids:
        first = grid is sheet.grids[0]
        yield _write_table(sheet, grid, _say(sheet) if first else sheet.notes)


def _write_narrow(sheet: Sheet, grid: Grid) -> str:
    """A grid for a page of one column; columns that were asked for are kept, and made smaller."""
    narrowed, omitted = narrow(grid, CHARACTERS_WIDE, 3)
    if grid.detail == "chosen" and omitted != ["intervals"]:
        return _write_table(sheet, grid, _say(sheet))
    left_out = [f"Left out for want of room: {'; '.join(omitted)}."] if omitted else []
    return _write_table(sheet, narrowed, [*_say(sheet), *left_out])


def _say(sheet: Sheet) -> list[str]:
    return [sheet.caption, *sheet.protocols, *sheet.notes, sheet.legend]


def _write_table(sheet: Sheet, grid: Grid, said: Sequence[str]) -> str:
    """One table with a label, a short caption and a note, or several where it is too tall for a page."""
    label = re.sub(r"[^a-z0-9]+", "-", f"{sheet.title} {grid.detail}".casefold()).strip("-")
    tables = []
    for start in range(0, len(grid.rows), TALL):
        part = Grid(grid.detail, grid.header, grid.rows[start : start + TALL])
        more = ", continued" if start else ""
        name = f"tab:{label}{f'-{start // TALL + 1}' if start else ''}"
        lines = [r"\begin{table}", r"\centering\footnotesize"]
        lines += [rf"\caption{{{escape(f'{sheet.title}: {grid.title.casefold()}{more}.')}}}\label{{{name}}}"]
        lines += [rf"\effbenchfit{{{_write_tabular(part)}}}", r"\end{table}"]
        tables.append("\n".join(lines))
    if said:
        note = r"\par\smallskip\parbox{\linewidth}{\scriptsize\raggedright " + " ".join(map(_break_words, said)) + "}"
        tables[-1] = tables[-1].replace(r"\end{table}", f"{note}\n\\end{{table}}")
    return "\n\n".join(tables)


def _write_tabular(grid: Grid) -> str:
    align = "".join("r" if numeric_column(column) else "l" for column in zip(*grid.rows, strict=True))
    header, *body = (" & ".join(map(escape, line)) + r" \\" for line in (grid.header, *grid.rows))
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"])


def _break_words(text: str) -> str:
    """Escaped text in which long words, such as names of protocols, may be broken after a mark."""
    words = (
        "\\allowbreak{}".join(map(escape, re.findall(r"[^.,_=/-]*[.,_=/-]?", word)))
        if len(word) > LONG_WORD
        else escape(word)
        for word in text.split()
    )
    return " ".join(words)
