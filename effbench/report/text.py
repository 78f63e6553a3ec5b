"""Numbers and tables as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from effbench.stats.paired import Estimate

DASH = "–"
LONGEST = 100  # characters of a name or a reason that a message repeats
LOPSIDED = 1.5  # the longer half of an interval over the shorter from which on ± would mislead
NUMBER = re.compile(r"[-+.\d][^a-df-jl-z]*")  # with letters of units: e, k, capitals
SPECIAL = re.compile(r"[\\`*<&$~]|\[(?=[^\]]*\]\()|(?<![^\W_])_|_(?![^\W_])")  # in Markdown
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def one_line(value: Any) -> str:
    """Anything as one line of text."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return " ".join(str(value).split())


def superscript(number: int) -> str:
    """The number as a footnote's mark."""
    return str(number).translate(SUPERSCRIPTS)


def with_interval(
    estimate: Estimate | None, scale: float = 1, digits: int = 3, limits: tuple[float, float] = (-math.inf, math.inf)
) -> str:
    """A value to at least so many digits, and its interval; `ˢ` marks that of seeds. A dash for None.

    The interval is `±` its longer half. Its bounds are printed instead, cut to the limits of what the value can be,
    where `±` would leave these limits, where one half is much longer than the other, and for the range of two seeds.
    """
    if estimate is None:
        return DASH
    value = estimate.value * scale
    low = value if estimate.low is None else estimate.low * scale
    high = value if estimate.high is None else estimate.high * scale
    reach, shorter = max(high - value, value - low), min(high - value, value - low)
    if not math.isfinite(value) or reach <= 1e-6 * abs(value) or max(abs(value), reach) >= 1e5:
        return rounded(value, digits)
    text: Callable[[float], str] = rounded
    if abs(value) >= 1e-3 or not value:
        fewest = digits - 1 - math.floor(math.log10(abs(value))) if abs(value) >= 0.1 else 0
        text = f"{{:.{max(places(reach), fewest)}f}}".format
    mark = "ˢ" if estimate.n > 1 else ""
    least, most = limits[0] * scale, limits[1] * scale
    if estimate.n == 2 or reach > LOPSIDED * shorter or value - reach < least or value + reach > most:
        return f"{text(value)} [{text(max(low, least))}–{text(min(high, most))}]{mark}"
    return f"{text(value)} ±{text(reach)}{mark}"


def places(reach: float) -> int:
    """Decimals worth showing of a number this uncertain.

    Two digits of the uncertainty where it begins with 1 or 2, else one: rounding changes it by 1/6 at most.
    """
    mantissa, exponent = f"{reach:.1e}".split("e")
    return max(0, (mantissa < "3") - int(exponent))


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
    """Whether the cells of a column are numbers, to be set flush right."""
    return all(cell == DASH or NUMBER.fullmatch(cell) for cell in column)


def markdown(text: str) -> str:
    """Plain text so that Markdown shows it as it is; pipes are the table's business."""
    return SPECIAL.sub(lambda match: f"\\{match[0]}", text)
