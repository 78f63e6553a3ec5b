"""`effbench docs`: write the pages that are generated from the source of the methods."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from effbench.cli.command import Command
from effbench.core.errors import Usage
from effbench.core.usage import named_path, parse


@dataclasses.dataclass
class DocsOptions:
    """What `effbench docs` can be told."""

    to: str | None = None  # folder for the pages, made if it is not there


def _docs(arguments: argparse.Namespace) -> int:
    options = parse(DocsOptions, arguments.options)
    if options.to is None:
        raise Usage("to= is missing: effbench docs to=FOLDER")

    from effbench.report.glossary import write_page
    from effbench.report.methods import index

    folder = named_path("to", options.to)
    methods, broken = index(folder)
    for name, text in {"methods.md": methods, "metrics.md": write_page()}.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise Usage(f"to={options.to}: cannot write there ({error.strerror})") from None
        print(f"wrote {folder / name}")
    for reason in broken:
        print(f"effbench: left out: {reason}", file=sys.stderr)
    return int(bool(broken))


COMMAND = Command(
    _docs,
    "write the index of methods and the glossary of metrics as pages; exit code 1 if a method is broken",
    options=DocsOptions,
)
