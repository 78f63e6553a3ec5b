"""`effbench compare`: two rows, item by item."""

from __future__ import annotations

import argparse
import dataclasses

from effbench.cli.command import Command
from effbench.core.paths import RUNS
from effbench.core.usage import named_path, parse


@dataclasses.dataclass
class CompareOptions:
    """What `effbench compare` can be told."""

    suite: str | None = None  # the suite in which the names are looked up
    results: str = RUNS  # folder of records; results for the published ones


def _compare(arguments: argparse.Namespace) -> int:
    from effbench.report.compare import compare, find_rows

    options = parse(CompareOptions, arguments.options)
    names = arguments.a, arguments.b
    print(compare(*find_rows(names, named_path("results", options.results), options.suite)))
    return 0


COMMAND = Command(
    _compare,
    "compare two rows item by item",
    {"a": "name of a recipe, or a record's file", "b": "the other"},
    CompareOptions,
)
