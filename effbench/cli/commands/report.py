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


@dataclasses.dataclass
class ReportOptions:
    """What `effbench report` can be told."""

    suite: str | None = None  # only this suite
    results: str | None = None  # folder of records; by default runs, for --write and --check the published ones
    format: str | None = None  # md, csv, tex, or rich for a terminal
    detail: str | None = None  # only summary, quality, speed, memory, compute or methods


def _report(arguments: argparse.Namespace) -> int:
    from effbench.cells.stale import is_stale
    from effbench.report import pages, published
    from effbench.report.sheets import DETAILS

    options = parse(ReportOptions, arguments.options)
    style = options.format or ("rich" if sys.stdout.isatty() else "md")
    one_of("format", style, pages.FORMATS)
    one_of("detail", options.detail, [name for name in DETAILS if name != published.DETAIL])
    if arguments.published and (style == "csv" or options.detail or arguments.write or arguments.check):
        raise Usage("--published has a table of its own: leave out detail=, format=csv, --write and --check")
    if style == "csv" and options.detail:
        raise Usage("format=csv has every metric of every record: leave out detail=")
    if arguments.write or arguments.check:
        if options.detail or options.format or (arguments.write and arguments.check):
            raise Usage("--write and --check are of whole pages: give one of them, without detail= and format=")
        results = _folder(options.results, PUBLISHED)
        return (_check if arguments.check else _write)(results, options.suite)
    records = pages.load(_folder(options.results, Path(RUNS)), options.suite)
    if not arguments.published:
        pages.print_tables(records, style, options.detail, is_stale)
    else:
        pages.print_sheets(published.make_published_sheets(records, stale=is_stale), style, published.DETAIL)
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
    from effbench.report import pages

    for path in pages.write(results, suite, pages.find_readme(results)):
        print(f"wrote {os.path.relpath(path)}")
    return 0


COMMAND = Command(
    _report,
    "print the tables of the records",
    options=ReportOptions,
    flags={
        "--published": "set the published results beside your own, with a verdict per row",
        "--check": "exit code 1 if the written tables are not what the published records say",
        "--write": "write the tables, and the blocks of the README beside the published ones",
    },
)
