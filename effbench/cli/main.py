"""The command line. Wrong usage is one line on stderr and exit code 2. Importing this imports no torch."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from effbench import __version__
from effbench.cli import commands
from effbench.cli.command import INTERRUPTED, Command
from effbench.core.errors import Usage
from effbench.core.usage import nearest

if TYPE_CHECKING:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and give the exit code: 0 fine, 1 some cell failed, 2 wrong usage, 130 interrupted."""
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except Usage as error:
        print(f"effbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("effbench: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(__version__)
        return 0
    if name not in (known := command_names()):
        raise Usage(f"unknown command {name!r}{nearest(name, known)}")
    command = load_command(name)
    try:
        parsed = command.parser(name).parse_intermixed_args(rest)
    except SystemExit as end:  # argparse ends the program after --help
        return int(end.code or 0)
    return command.act(parsed)


def command_names() -> list[str]:
    """Every command: the files of the folder `commands`."""
    return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))


def load_command(name: str) -> Command:
    """The command of that name, imported."""
    command: Command = importlib.import_module(f"{commands.__name__}.{name}").COMMAND
    return command


def _overview() -> str:
    lines = [f"  {name:<9} {load_command(name).summary}" for name in command_names()]
    return "\n".join(
        [
            "usage: effbench COMMAND ...",
            "",
            "What does an efficiency method for language models cost, and what does it buy?",
            "",
            *lines,
            "",
            "`effbench COMMAND --help` tells more, `effbench run suite=quant` is a good start.",
        ]
    )
