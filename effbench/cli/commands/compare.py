"""`effbench compare`: two rows, item by item."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from effbench.core.usage import parse

if TYPE_CHECKING:
    pass
from effbench.cli.command import Command


@dataclasses.dataclass
class CompareOptions:
    """What `effbench compare` can be told."""

    suite: str | None = None  # the suite in which the names are looked up
    results: str = "results"  # folder of records and tables


def _compare(arguments: argparse.Namespace) -> int:
    from effbench.report import compare

    options = dataclasses.asdict(parse(CompareOptions, arguments.options))
    return compare.main(options | {"a": arguments.a, "b": arguments.b})


COMMAND = Command(
    _compare,
    "compare two rows item by item",
    {"a": "name of a recipe, or a record's file", "b": "the other"},
    CompareOptions,
)
