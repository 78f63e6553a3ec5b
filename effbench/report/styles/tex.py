"""Sheets as LaTeX, for the packages booktabs and siunitx."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from effbench.report.sheets import Grid, Sheet, narrow
from effbench.report.text import DASH, SUPERSCRIPTS, numeric_column

CHARACTERS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_",
    "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "[": "{[}", "]": "{]}", "±": r"$\pm$", "×": r"$\times$", "–": "--",
    "●": r"$\bullet$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "ˢ": r"\textsuperscript{s}",
    **{chr(mark): rf"\textsuperscript{{{chr(digit)}}}" for digit, mark in SUPERSCRIPTS.items()},
}  # fmt: skip
CHARACTERS_WIDE = 88  # of a line of footnotesize across the text of an article in one column; a gap takes three
TALL = 40  # rows of one table of a paper; more become several tables
LONG_WORD = 30  # characters of a word from which on it may be broken after a mark
NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(?: ±(\d+(?:\.\d+)?))?(ˢ?(?: [↑↓])?(?: ∅)?)")  # and what stands behind it
HEAD = r"""% Needs \usepackage{booktabs,graphicx,siunitx}.
\sisetup{separate-uncertainty=true,group-digits=none,text-series-to-math=true,propagate-math-font=true}
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
        best = frozenset((row - start, column) for row, column in grid.best)
        part = Grid(grid.detail, grid.header, grid.rows[start : start + TALL], best)
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
    """Columns of plain numbers are siunitx's, their decimal points below each other; cells that are surely the best of
    their column are bold.
    """
    columns = list(zip(*grid.rows, strict=True))
    formats = [_find_format(column) for column in columns]
    align = "".join(
        f"S[{form}]" if form else "r" if numeric_column(column) else "l"
        for form, column in zip(formats, columns, strict=True)
    )
    header = " & ".join(
        f"{{{escape(name)}}}" if form else escape(name) for name, form in zip(grid.header, formats, strict=True)
    )
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", rf"{header} \\", r"\midrule"]
    for i, row in enumerate(grid.rows):
        cells = (
            _write_cell(cell, bool(form), (i, j) in grid.best)
            for j, (cell, form) in enumerate(zip(row, formats, strict=True))
        )
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _find_format(column: Sequence[str]) -> str:
    """siunitx's format of a column: digits before and behind the point, of the numbers and of their uncertainties;
    empty where a cell is no plain number.
    """
    found = [NUMBER.fullmatch(cell) for cell in column if cell != DASH]
    matches = [match for match in found if match is not None]
    if not matches or len(matches) < len(found):
        return ""
    numbers = [match[1].lstrip("-").partition(".") for match in matches]
    whole, decimals = (max(len(parts[place]) for parts in numbers) for place in (0, 2))
    sign = "-" if any(match[1].startswith("-") for match in matches) else ""
    # Digits of an uncertainty are counted from the last decimal of the column.
    reaches = [len(match[2].partition(".")[0].lstrip("0")) + decimals for match in matches if match[2]]
    marks = max((match[3].strip() for match in matches), key=len)
    room = f",table-space-text-post={{{escape(marks)}}}" if marks else ""
    return f"table-format={sign}{whole}.{decimals}" + (f"({max(reaches)})" if reaches else "") + room


def _write_cell(cell: str, number: bool, best: bool) -> str:
    """A cell of a column of numbers as siunitx reads it, or of text."""
    match = NUMBER.fullmatch(cell) if number else None
    if match is None:
        text = rf"\textbf{{{escape(cell)}}}" if best else escape(cell)
        return f"{{{text}}}" if number else text
    value = match[1] + (f" +- {match[2]}" if match[2] else "")
    marks = f" {{{escape(match[3].strip())}}}" if match[3] else ""
    return (r"\bfseries " if best else "") + value + marks


def _break_words(text: str) -> str:
    """Escaped text in which long words, such as names of protocols, may be broken after a mark."""
    words = (
        "\\allowbreak{}".join(map(escape, re.findall(r"[^.,_=/-]*[.,_=/-]?", word)))
        if len(word) > LONG_WORD
        else escape(word)
        for word in text.split()
    )
    return " ".join(words)
