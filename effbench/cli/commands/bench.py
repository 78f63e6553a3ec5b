"""`effbench bench`: kernels beside torch's and others'."""

from __future__ import annotations

import argparse

from effbench.bench.options import BenchOptions
from effbench.cli.command import Command
from effbench.core.usage import parse


def _bench(arguments: argparse.Namespace) -> int:
    options = parse(BenchOptions, arguments.options)
    from effbench.bench import document

    return document.main(options, compile=arguments.compile, json=arguments.json)


COMMAND = Command(
    _bench,
    "compare kernels at the sizes of real models: correct first, then timed",
    options=BenchOptions,
    flags={"--compile": "compile them for sm_90 instead, which needs no GPU", "--json": "for machines"},
)
