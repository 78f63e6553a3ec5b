"""`effbench run`: run a suite or a recipe."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING

from effbench.cells.options import RunOptions
from effbench.core.usage import parse
from effbench.records.record import FAILED, Record

if TYPE_CHECKING:
    from effbench.cells.plan import Run
from effbench.cli.command import INTERRUPTED, Command, print_columns


def _run(arguments: argparse.Namespace) -> int:
    from effbench.cells import plan as runner
    from effbench.cells.local import Event, Local
    from effbench.cells.run import run_cells
    from effbench.cli import progress
    from effbench.records.store import Store

    options = parse(RunOptions, arguments.options)
    run = runner.plan(options)
    out = sys.stderr if arguments.json else sys.stdout
    for note in run.notes:
        print(f"effbench: {note}", file=sys.stderr)
    if arguments.dry_run:
        _print_plan(run, arguments.json)
        return 0
    print(progress.opening(run), file=out, flush=True)
    for record in run.done if arguments.json else []:
        _print_record(record)

    begin = time.monotonic()
    executor = Local(run.placement.jobs, options.timeout, run.placement.threads)
    display = (progress.Live if out.isatty() else progress.Lines)(len(run.todo), out)

    def watch(event: Event) -> None:
        display.watch(event)
        if arguments.json and event.record is not None:
            _print_record(event.record)

    store = Store(options.folder)
    with display:
        fresh, interrupted = run_cells(run.todo, store, executor, watch)
    if interrupted:
        kept = f"{len(fresh)} of {len(run.todo)} cells are done and kept"
        print(f"effbench: interrupted; {kept}, the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    print(progress.closing(fresh, time.monotonic() - begin, store), file=out)
    by_identity = {record.cell.identity: record for record in [*run.done, *fresh]}
    records = [by_identity[cell.job.cell.identity] for cell in run.cells]
    if not arguments.json:
        from effbench.report.tables import render

        print(f"\n{render(records, run.suite.name, 'rich' if out.isatty() else 'md')}", end="")
    return int(any(record.outcome in FAILED for record in records))


def _print_plan(run: Run, as_json: bool) -> None:
    from effbench.cli.progress import opening

    rows = [
        {
            "action": "run" if planned.done is None else "skip",
            "recipe": planned.job.cell.recipe,
            "seed": planned.job.cell.seed,
            "steps": planned.job.cell.steps,
            "why": planned.why,
            "identity": planned.job.cell.identity,
        }
        for planned in run.cells
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(opening(run))
    print_columns([[str(row[key]) for key in ("action", "recipe", "seed", "why")] for row in rows])


def _print_record(record: Record) -> None:
    print(json.dumps(json.loads(record.to_json())), flush=True)


COMMAND = Command(
    _run,
    "run a suite or a recipe; cells that are done are not run again",
    options=RunOptions,
    flags={
        "--dry-run": "say what would run and why, and run nothing",
        "--json": "one record per line on stdout, nothing else",
    },
)
