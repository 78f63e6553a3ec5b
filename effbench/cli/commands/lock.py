"""`effbench lock`: hold what each version of a suite means."""

from __future__ import annotations

import argparse
import sys

from effbench.cli.command import Command


def _lock(arguments: argparse.Namespace) -> int:
    from effbench.cells.lock import FILE, check_lock, write_lock
    from effbench.core.errors import Usage
    from effbench.core.paths import CHECKOUT

    if CHECKOUT is None:
        raise Usage("effbench lock works in a source checkout: the suites of an installed package do not change")
    if arguments.check:
        complaints = check_lock()
        for complaint in complaints:
            print(complaint, file=sys.stderr)
        return int(bool(complaints))
    print(f"wrote suites/{FILE}" if write_lock() else f"suites/{FILE} holds all suites as they are")
    return 0


COMMAND = Command(
    _lock,
    "lock new versions and new rows of the suites",
    flags={"--check": "exit code 1 if a suite changed its rows or settings without a new version"},
)
