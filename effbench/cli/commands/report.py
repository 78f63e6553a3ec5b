"""`effbench report`: print the tables of the records."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from effbench.cli.command import Command
from effbench.core.errors import Usage
from effbench.core.paths import PUBLISHED, RUNS
from effbench.core.usage import named_path, one_of, parse

PAGE = "html"  # the format of a page by itself


@dataclasses.dataclass
class ReportOptions:
    """What `effbench report` can be told."""

    suite: str | None = None  # only this suite
    results: str | None = None  # folder of records; by default runs, for --write and --check the published ones
    format: str | None = (
        None  # md, csv, tex, or rich for a terminal; html: a page, png, svg, pdf: plots, written to a folder
    )
    to: str | None = None  # that folder
    detail: str | None = None  # only one kind of columns: summary, quality, front, speed, memory, compute, methods ...
    rows: str | None = None  # only these recipes and the baseline: names or patterns, separated by commas
    columns: str | None = None  # only these: headers or names of metrics, or patterns, separated by commas
    tier: str | None = None  # only this tier
    model: str | None = None  # only this model
    x: str | None = (
        None  # of plots: what rows cost, metrics or headers separated by commas; by default each that differs
    )
    y: str | None = None  # of plots: how good they are, one metric or header; by default what the table is about
    layout: str | None = None  # of format=tex: page (all tables) or paper (one for a page of a paper, with a label)


def _report(arguments: argparse.Namespace) -> int:
    from effbench.cells.stale import is_stale
    from effbench.report import figures, page, pages, published
    from effbench.report.choice import Choice
    from effbench.report.columns import DETAILS
    from effbench.report.groups import group_records

    options = parse(ReportOptions, arguments.options)
    if arguments.glossary:
        return _define(options)
    style = options.format or ("rich" if sys.stdout.isatty() else "md")
    one_of("format", style, (*pages.FORMATS, *figures.STYLES, PAGE))
    one_of("detail", options.detail, [name for name in DETAILS if name not in (published.DETAIL, "chosen")])
    one_of("layout", options.layout, ("page", "paper"))
    _check_together(arguments, options, style, style in figures.STYLES)
    if arguments.write or arguments.check:
        results = _folder(options.results, PUBLISHED)
        return (_check if arguments.check else _write)(results, options.suite)
    results = _folder(options.results, Path(RUNS))
    records = pages.load(results, options.suite)
    records = pages.select_records(records, tier=options.tier, model=options.model)
    if options.to is not None:
        tables, choice, folder = group_records(records), Choice.read(options.rows, None), named_path("to", options.to)
        choice.check(tables)
        if style == PAGE:
            kept = pages.read_tests(results, {table.cell.suite for table in tables})
            written = [page.write_page(tables, folder, options.suite, kept, is_stale, choice)]
        else:
            written = figures.write_figures(tables, folder, style, choice, options.x, options.y)
        print("\n".join(f"wrote {path}" for path in written))
    elif not arguments.published:
        style = "paper" if options.layout == "paper" else style
        pages.print_tables(records, style, options.detail, is_stale, Choice.read(options.rows, options.columns))
    else:
        pages.print_sheets(published.make_published_sheets(records, stale=is_stale), style, published.DETAIL)
    return 0


def _check_together(arguments: argparse.Namespace, options: ReportOptions, style: str, plotted: bool) -> None:
    """Raise `Usage` for options that say nothing to each other."""
    chosen = options.rows or options.columns or options.layout or options.x or options.y or options.to
    if arguments.published and (style == "csv" or options.detail or chosen or arguments.write or arguments.check):
        raise Usage("--published has a table of its own: leave out format=csv and what chooses others")
    if options.detail and options.columns:
        raise Usage("detail= and columns= both choose columns: give one of them")
    if options.layout and style != "tex":
        raise Usage("layout= is of LaTeX: add format=tex")
    if style == "csv" and options.detail:
        raise Usage("format=csv has every metric of every record: leave out detail=")
    if arguments.write or arguments.check:
        narrower = options.detail or options.format or chosen or options.tier or options.model
        if narrower or (arguments.write and arguments.check):
            raise Usage("--write and --check are of whole pages: give one of them, with suite= and results= at most")
    if plotted and (options.detail or options.columns):
        raise Usage(f"format={style} plots fronts: choose by rows=, x= and y=")
    if style == PAGE and (options.detail or options.columns):
        raise Usage(f"format={PAGE} has all columns to choose from: leave out detail= and columns=")
    if (plotted or style == PAGE) and not options.to:
        raise Usage(f"format={style} writes files: name a folder, to=FOLDER")
    if not plotted and (options.x or options.y):
        raise Usage("x= and y= are axes of plots: add format=png, svg or pdf")
    if not plotted and style != PAGE and options.to:
        raise Usage("to= is of pages and plots: add format=html, png, svg or pdf")


def _define(options: ReportOptions) -> int:
    """Print what every column means."""
    from effbench.report.glossary import write_columns

    if options != ReportOptions():
        raise Usage("--glossary defines every column of every table: leave out all options")
    print(write_columns())
    return 0


def _folder(given: str | None, default: Path | None) -> Path:
    if given is None and default is None:
        raise Usage("results=: name the folder; nothing is published with an installed package")
    return named_path("results", given) if given is not None else default  # type: ignore[return-value]


def _check(results: Path, suite: str | None) -> int:
    from effbench.cells.stale import is_stale
    from effbench.report import pages

    records = pages.load(results, suite)
    for line in pages.count_stale(records, is_stale):
        print(f"warning: {line}", file=sys.stderr)
    differences = pages.check(results, suite, pages.find_readme(results), records)
    if differences:
        print("\n".join([*differences, "regenerate with `effbench report --write`"]), file=sys.stderr)
    return int(bool(differences))


def _write(results: Path, suite: str | None) -> int:
    from effbench.report import blocks, pages

    readme = pages.find_readme(results)
    for path in pages.write(results, suite, readme):
        print(f"wrote {os.path.relpath(path)}")
    for line in blocks.find_crowded(readme):
        print(f"warning: {line}", file=sys.stderr)
    return 0


COMMAND = Command(
    _report,
    "print the tables of the records",
    options=ReportOptions,
    flags={
        "--glossary": "say what every column of the tables means",
        "--published": "set the published results beside your own, with a verdict per row",
        "--check": "exit code 1 if the written tables are not what the published records say",
        "--write": "write the tables, and the blocks of the README beside the published ones",
    },
)
