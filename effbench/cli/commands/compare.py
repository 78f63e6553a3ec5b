"""`effbench compare`: two rows, item by item."""

from __future__ import annotations

import argparse
import dataclasses

from effbench.cli.command import Command
from effbench.core.errors import Usage
from effbench.core.paths import RUNS
from effbench.core.usage import named_path, parse


@dataclasses.dataclass
class CompareOptions:
    """What `effbench compare` can be told."""

    suite: str | None = None  # the suite in which the names are looked up
    results: str = RUNS  # folder of records; results for the published ones


def _compare(arguments: argparse.Namespace) -> int:
    from effbench.report.compare import compare, find_rows

    names = arguments.a, arguments.b
    for name in names:
        if name.partition("=")[0] in CompareOptions.__dataclass_fields__:
            raise Usage(f"{name!r} is an option: two rows are needed before it, `effbench compare A B {name}`")
    options = parse(CompareOptions, arguments.options)
    print(compare(*find_rows(names, named_path("results", options.results), options.suite)))
    return 0


COMMAND = Command(
    _compare,
    "compare two rows item by item",
    {"a": "name of a recipe, or a record's file", "b": "the other"},
    CompareOptions,
)
