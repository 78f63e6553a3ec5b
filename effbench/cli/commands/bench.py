"""`effbench bench`: kernels beside torch's and others'."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from effbench.core.usage import parse

if TYPE_CHECKING:
    pass
from effbench.cli.command import Command


@dataclasses.dataclass
class BenchOptions:
    """What `effbench bench` can be told."""

    op: str | None = None  # only this op
    device: str | None = None  # cpu, cuda or cuda:N; by default the first GPU, else the processor
    dtype: str | None = None  # float32, bfloat16, float16; by default float32 on a processor, else bfloat16
    seconds: float | None = None  # after which no case is begun any more; what is left out is named
    out: str | None = None  # JSON file to write, or a folder for one named after the machine


def _bench(arguments: argparse.Namespace) -> int:
    options = dataclasses.asdict(parse(BenchOptions, arguments.options))
    from effbench.bench import measure as bench

    return bench.main(options | {"compile": arguments.compile, "json": arguments.json})


COMMAND = Command(
    _bench,
    "compare kernels at the sizes of real models: correct first, then timed",
    options=BenchOptions,
    flags={"--compile": "compile them for sm_90 instead, which needs no GPU", "--json": "for machines"},
)
