"""`effbench export`: write the model that a row of a suite, or a recipe, measures to a folder."""

from __future__ import annotations

import argparse
import sys

from effbench.cells.export import ExportOptions
from effbench.cli.command import Command
from effbench.core.errors import Usage
from effbench.core.usage import given, parse


def _export(arguments: argparse.Namespace) -> int:
    from effbench.cells.export import export
    from effbench.cells.failures import diagnose
    from effbench.cells.suite import Settings

    options = parse(ExportOptions, arguments.options)
    changes = given(Settings, arguments.set, "setting")
    try:
        print(export(options, changes, lambda text: print(text, file=sys.stderr, flush=True)))
    except Usage:
        raise
    except Exception as error:
        failure = diagnose(error)
        if failure.traceback:
            raise
        print(f"effbench: {failure.outcome}: {failure.reason}", file=sys.stderr)
        return 1
    return 0


COMMAND = Command(
    _export,
    "write the model that a row of a suite, or a recipe, measures to a folder",
    options=ExportOptions,
    repeated={"--set": "change a setting of the suite, such as --set calibration_sequences=64; any number of times"},
)
