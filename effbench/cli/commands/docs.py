"""`effbench docs`: write the generated pages."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
from effbench.cli.command import Command


def _docs(arguments: argparse.Namespace) -> int:
    from effbench.report import methods as docs

    return docs.main({"check": arguments.check})


COMMAND = Command(_docs, "write the generated pages", flags={"--check": "1 if they are not up to date"})
