"""`effbench export`: run a recipe and write its model to a folder."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from effbench.cells.export import ExportOptions
from effbench.core.errors import Usage
from effbench.core.usage import parse

if TYPE_CHECKING:
    pass
from effbench.cli.command import Command


def _export(arguments: argparse.Namespace) -> int:
    from effbench.cells.export import export
    from effbench.cells.failures import diagnose

    options = parse(ExportOptions, arguments.options)
    try:
        print(export(options))
    except Usage:
        raise
    except Exception as error:
        failure = diagnose(error)
        if failure.traceback:
            raise
        print(f"effbench: {failure.outcome}: {failure.reason}", file=sys.stderr)
        return 1
    return 0


COMMAND = Command(_export, "run a recipe and write its model to a folder", options=ExportOptions)
