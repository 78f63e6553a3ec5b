"""Numbers and tables as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

DASH = "–"


def rounded(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent between 0.001 and 100,000."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -3 <= int(exponent) < 5:
        return f"{value:.{max(0, digits - 1 - int(exponent))}f}"
    return f"{mantissa}e{int(exponent)}"


def bytes_text(size: float) -> str:
    """Bytes in decimal units."""
    if size < 1000:
        return f"{size:.0f} B"
    power = min(4, int(math.log10(size)) // 3)
    return f"{rounded(size / 1000**power)} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], pad: bool = True) -> str:
    """A table of cells that are Markdown already; padded, it reads well in a terminal too."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    numeric = [numeric_column(column) for column in zip(*rows, strict=True)]
    widths = [max(3, *map(len, column)) if pad else 3 for column in zip(*lines, strict=True)]
    rule = ["-" * (width - 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    aligned = [
        [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric, strict=True)]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def numeric_column(column: Iterable[str]) -> bool:
    """Whether the cells of a column are numbers, to be set flush right (letters of units: e, k, capitals)."""
    return all(re.fullmatch(r"[-+.\d][^a-df-jl-z]*", cell) or cell == DASH for cell in column)


def markdown(text: str) -> str:
    """Plain text so that Markdown shows it as it is; pipes are the table's business."""
    return re.sub(r"([\\`*<&$~]|\[(?=[^\]]*\]\()|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)
