"""From the options of `effbench bench` to its document, its tables and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from effbench.bench.compile import compile_cases
from effbench.bench.measure import measure
from effbench.bench.options import BenchOptions
from effbench.core.errors import Usage
from effbench.core.files import create_file
from effbench.core.usage import named_path
from effbench.machine.environment import describe
from effbench.machine.placement import place
from effbench.ops import list_ops, load
from effbench.records.timings import Compilation, Document, Row, encode
from effbench.report.kernels import has_failed, label, page


def main(options: BenchOptions, compile: bool = False, json: bool = False) -> int:
    """Measure, or compile, and print a table, or the document as JSON; write the document where `out` says.

    Gives 1 when a backend failed or was not correct. Raises `Usage`.
    """
    names = [load(options.op).name] if options.op else list_ops()
    options.check(compile)
    device = torch.device("cpu" if compile else place(options.device).device.split(",")[0])  # of several, the first
    facts = describe(str(device))
    path = _choose_path(options.out, str(facts["machine"]))
    document: Document
    if compile:
        document = Compilation(environment=facts, rows=compile_cases(names))
    else:
        dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
        document = measure(names, device, dtype, facts, options.seconds, _print_progress)
    sys.stdout.write(encode(document) if json else page(document))
    if path is not None:  # last: what was measured has been printed, whatever the disk says
        _write(path, document)
    return int(has_failed(document))


def _choose_path(out: str | None, machine: str) -> Path | None:
    """The file to write, `out` or in that folder one named for the machine. Raises `Usage` where there is one."""
    if out is None:
        return None
    path = named_path("out", out)
    path = path if path.suffix == ".json" else path / f"{machine}.json"
    if path.exists():
        raise _refuse(path)
    return path


def _write(path: Path, document: Document) -> None:
    try:
        create_file(path, encode(document))
    except FileExistsError:
        raise _refuse(path) from None
    except OSError as error:
        raise Usage(f"out={path}: cannot be written ({error.strerror}); name another file") from None


def _refuse(path: Path) -> Usage:
    return Usage(f"out={path}: exists and is not overwritten; name another file")


def _print_progress(rows: Sequence[Row]) -> None:
    """A line about one case, on stderr."""
    speeds = [f"{row.name} {row.speedup.median:.2f}x" for row in rows if row.speedup]
    print(f"{rows[0].op} {label(rows[0].case)}: {', '.join(speeds)}", file=sys.stderr, flush=True)
