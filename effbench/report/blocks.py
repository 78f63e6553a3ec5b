"""Blocks of the README and of pages in `docs/` that are made from records: tables, plots, and rows against one of them.

A marker says what stands in its block, each part behind the name of the suite optional but those of `against`:

    <!-- effbench:table quant tier=full rows=gptq-3b,rtn-* columns=bits,perplexity -->
    <!-- effbench:plot quant tier=real x=stored_bytes y=perplexity -->
    <!-- effbench:against kd row=student-alone rows=kd-*,gkd-tuned metric=token_ppl -->
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from effbench.core.errors import Usage
from effbench.core.usage import nearest, one_of, parse
from effbench.report.changes import Change, find_changes
from effbench.report.choice import Choice
from effbench.report.compare import (
    HEADER,
    HEADER_OF_RATIOS,
    correct,
    find_obstacle,
    write_chances,
    write_difference,
    write_effects,
    write_ratio,
)
from effbench.report.differences import Kept
from effbench.report.drawings import Drawing, PlotBlock, check_apart, make_drawing
from effbench.report.groups import Row, Table
from effbench.report.sheets import cut_to_detail, make_sheets, make_titles
from effbench.report.styles import markdown as style
from effbench.report.text import markdown, markdown_table
from effbench.report.verdicts import Effects, judge

MARKED = re.compile(r"(<!-- effbench:(table|against|plot) ([^\n]*?) ?-->\n)(.*?)(<!-- /effbench:\2 -->)", re.DOTALL)
MOST_ROWS = 12


class Source(NamedTuple):
    """A suite's tables, the tests that are kept of them, and the page that has all of them."""

    tables: Sequence[Table]
    kept: Kept | None
    page: Path


@dataclasses.dataclass
class TableBlock:
    """One table of a suite: chosen rows and columns."""

    tier: str | None = None  # that of the first table, where none is named
    model: str | None = None
    rows: str | None = None  # names of recipes, or patterns; the baseline is always shown
    columns: str | None = None  # headers or names of metrics; by default those of the summary


@dataclasses.dataclass
class AgainstBlock:
    """Rows of a table against one of them, by one metric."""

    row: str = ""  # A of all comparisons
    rows: str = ""  # names of recipes, or patterns: each is B of one
    metric: str = ""
    tier: str | None = None
    model: str | None = None


def list_documents(readme: Path | None) -> list[Path]:
    """The README and the pages beside it that have blocks."""
    if readme is None or not readme.is_file():
        return []
    pages = sorted((readme.parent / "docs").glob("*.md"))
    return [readme, *(page for page in pages if MARKED.search(page.read_text(encoding="utf-8")))]


def fill_blocks(document: Path, sources: Mapping[str, Source], suite: str | None = None) -> str:
    """The text of a document with its blocks made anew, those of one suite or all. Raises `Usage` for a marker that
    names what is not there.
    """

    def fill(match: re.Match[str]) -> str:
        begin, kind, marker, _, end = match.groups()
        name, *options = marker.split()
        if suite not in (None, name):
            return match[0]
        if name not in sources:
            raise Usage(f"{document}: no records of suite {name!r}{nearest(name, sources)}")
        try:
            return f"{begin}{_render(kind, sources[name], options, document)}{end}"
        except Usage as error:
            raise Usage(f"{document}: effbench:{kind} {marker}: {error}") from None

    return MARKED.sub(fill, document.read_text(encoding="utf-8"))


def draw_plots(documents: Sequence[Path], sources: Mapping[str, Source], suite: str | None = None) -> dict[Path, str]:
    """The files of the plots of documents whose blocks could be filled, with the texts that they should have."""
    drawings = [
        _draw(sources[name], options)
        for document in documents
        for _, kind, marker, *_ in MARKED.findall(document.read_text(encoding="utf-8"))
        for name, *options in [marker.split()]
        if kind == "plot" and suite in (None, name)
    ]
    check_apart(drawings)
    return {drawing.path: drawing.render() for drawing in drawings}


def find_crowded(readme: Path | None) -> list[str]:
    """A line for each block that has more rows than a reader takes in."""
    counts = {
        (document, match[2], match[3]): sum(line.startswith("|") for line in match[4].splitlines()) - 2
        for document in list_documents(readme)
        for match in MARKED.finditer(document.read_text(encoding="utf-8"))
    }
    return [
        f"{document}: effbench:{kind} {marker}: {count} rows, at most {MOST_ROWS}; "
        "choose with rows=NAME,PATTERN behind it"
        for (document, kind, marker), count in counts.items()
        if count > MOST_ROWS
    ]


def _render(kind: str, source: Source, options: Sequence[str], document: Path) -> str:
    full = _point(source.page, document)
    if kind == "plot":
        drawing = _draw(source, options)
        return drawing.write_block(_point(drawing.path, document), full)
    if kind == "against":
        return render_against(source.tables, parse(AgainstBlock, options))
    return render_table(source.tables, parse(TableBlock, options), full, source.kept)


def _draw(source: Source, options: Sequence[str]) -> Drawing:
    block = parse(PlotBlock, options)
    table = _find_table(source.tables, block.tier, block.model)
    titles = dict(zip(map(id, source.tables), make_titles(source.tables), strict=True))
    return make_drawing(table, titles[id(table)], block, source.page.parent.parent / "plots")


def _point(file: Path, document: Path) -> str:
    """The address of a file in a document."""
    return Path(os.path.relpath(file, document.parent)).as_posix()


def render_table(tables: Sequence[Table], block: TableBlock, full: str, kept: Kept | None = None) -> str:
    """Markdown: one table of a suite, its chosen rows and columns alone, and where the others are.

    `full` is the address of the page that has all of them. Raises `Usage` where there is no such table, row or column.
    """
    table = _find_table(tables, block.tier, block.model)
    choice = Choice.read(block.rows, block.columns)
    choice.check([table])
    (sheet,) = make_sheets([table], kept, choice=choice)
    sheet = dataclasses.replace(sheet, advice="")
    shown = f"{len(table.rows) - sheet.omitted} of {len(table.rows)} rows"
    rest = f"{shown}; all rows, columns and tiers: [`{full}`]({full})."
    return f"{style.block(cut_to_detail(sheet, sheet.grids[0].detail))}\n\n{rest}\n"


def render_against(tables: Sequence[Table], block: AgainstBlock) -> str:
    """Markdown: rows against one, by one metric, as `effbench compare` does, corrected over the block.

    Raises `Usage` where there is no such row or metric, or where two rows cannot be compared.
    """
    if not (block.row and block.rows and block.metric):
        raise Usage("name row=, the rows= that stand against it, and metric=")
    table = _find_table(tables, block.tier, block.model)
    Choice.read(block.rows, None).check([table])
    named = {row.recipe: row for row in table.rows}
    one_of("row", block.row, named)
    before = named[block.row]
    rows = [row for row in Choice.read(block.rows, None).select_rows(table) if row not in (before, table.rows[0])]
    if not rows:
        raise Usage(f"rows={block.rows}: name rows other than {block.row}")
    changes = [_find_change(before, row, block.metric) for row in rows]
    effects = Effects()
    lines = []
    for row, change, p in zip(rows, changes, correct(changes), strict=True):
        numbers = write_ratio(change)[1:] if change.relative else [*write_difference(change), str(change.test.n)]
        verdict = judge(change.metric, change.test, p, effects)
        lines.append([markdown(row.recipe), *numbers, *write_chances(change, p), verdict])
    header = [name for name in (HEADER_OF_RATIOS if changes[0].relative else HEADER) if name != "lost, gained"]
    cell = table.cell
    title = (
        f"**{markdown(block.metric)}** of {cell.suite} v{cell.suite_version}, {cell.tier} tier, model {cell.model}, "
        f"seeds {', '.join(str(one.cell.seed) for one in before.records)}; A is {markdown(before.recipe)}."
    )
    told = " ".join(write_effects(effects).split())
    return f"{title}\n\n{markdown_table(['B', *header[1:]], lines)}\n\n{markdown(told)}\n"


def _find_change(before: Row, after: Row, metric: str) -> Change:
    if obstacle := find_obstacle(before, after):
        raise Usage(f"{before.recipe} and {after.recipe} cannot be compared: {obstacle}")
    found = {change.metric: change for change in find_changes(before, after).found}
    if metric not in found:
        raise Usage(
            f"metric={metric}: not to be compared of {before.recipe} and {after.recipe}{nearest(metric, found)}"
        )
    return found[metric]


def _find_table(tables: Sequence[Table], tier: str | None, model: str | None) -> Table:
    """The first table of a tier and a model. Raises `Usage` where there is none."""
    for field, value in (("tier", tier), ("model", model)):
        one_of(field, value, dict.fromkeys(getattr(table.cell, field) for table in tables))
    for table in tables:
        if tier in (None, table.cell.tier) and model in (None, table.cell.model):
            return table
    raise Usage(f"no table of tier={tier} and model={model}")
