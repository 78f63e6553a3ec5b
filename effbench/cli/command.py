"""What a command is: what it does, how it is written, and the function that takes its arguments."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

from effbench.core.errors import Usage
from effbench.core.source import document_fields

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `Usage`."""

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message} (to {self.description}); see {self.prog} --help")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what it does, how it is written, and the function that takes its arguments."""

    act: Callable[[argparse.Namespace], int]
    summary: str
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)  # arguments by position, [optional], and help
    options: type | None = None  # the class of its key=value options
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    repeated: Mapping[str, str] = dataclasses.field(default_factory=dict)  # flags that take key=value
    notes: Callable[[], str] | None = None  # more for --help, after the options

    def parser(self, name: str) -> Parser:
        """The parser of this command's arguments."""
        parser = Parser(
            prog=f"effbench {name}",
            description=self.summary,
            allow_abbrev=False,
            epilog=self._epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for word, text in self.words.items():
            parser.add_argument(word.strip("[]"), nargs="?" if word.startswith("[") else None, help=text)
        if self.options:
            parser.add_argument("options", nargs="*", default=[], metavar="key=value", help="options, listed below")
        for flag, text in self.flags.items():
            parser.add_argument(flag, action="store_true", help=text)
        for flag, text in self.repeated.items():
            parser.add_argument(flag, action="append", default=[], metavar="key=value", help=text)
        return parser

    def _epilog(self) -> str:
        options = [document_options(self.options)] if self.options else []
        return "\n\n".join([*options, *([self.notes()] if self.notes else [])])


def document_options(cls: type, title: str = "options:", mark: str = "=") -> str:
    """Help on the fields of an options class, from the comments beside them."""
    fields = document_fields(cls).values()
    values = {field.name: field.default for field in dataclasses.fields(cls)}  # a default may be written as a name
    width = max(len(field.name) for field in fields) + len(mark) + 1
    lines = [
        f"  {field.name + mark:<{width}}{field.comment}"
        + _show_default(field.default if values[field.name] is dataclasses.MISSING else values[field.name])
        for field in fields
    ]
    return "\n".join([title, *lines])


def _show_default(default: object) -> str:
    return "" if default in (None, "None") else f" [{default}]"


def print_columns(rows: Iterable[Sequence[str]]) -> None:
    """Print rows of equal length, columns aligned."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=False)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())


JSON = {"--json": "print JSON"}
