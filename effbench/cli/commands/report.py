"""`effbench report`: print the tables of the records."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from effbench.core.usage import parse

if TYPE_CHECKING:
    pass
from effbench.cli.command import Command


@dataclasses.dataclass
class ReportOptions:
    """What `effbench report` can be told."""

    suite: str | None = None  # only this suite
    results: str = "results"  # folder of records and tables
    format: str | None = None  # md, csv, tex or rich


def _report(arguments: argparse.Namespace) -> int:
    from effbench.report import tables as report

    options = dataclasses.asdict(parse(ReportOptions, arguments.options))
    return report.main(options | {"check": arguments.check, "write": arguments.write})


COMMAND = Command(
    _report,
    "print the tables of the records",
    options=ReportOptions,
    flags={"--check": "1 if the written tables are not these", "--write": "write them to results/tables"},
)
