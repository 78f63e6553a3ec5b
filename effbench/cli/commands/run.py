"""`effbench run`: run a suite or a recipe."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from effbench.cells.options import RunOptions
from effbench.cli.command import INTERRUPTED, Command, document_options, print_columns
from effbench.core.errors import Unavailable
from effbench.core.usage import given, parse
from effbench.records.record import FAILED, Record

if TYPE_CHECKING:
    from effbench.cells.plan import Batch


def _run(arguments: argparse.Namespace) -> int:
    from effbench.cells.local import Event, Local
    from effbench.cells.plan import check_models, expect_seconds, plan
    from effbench.cells.run import find_lost
    from effbench.cells.suite import Settings
    from effbench.cli import progress
    from effbench.records.store import Store

    options = parse(RunOptions, [*arguments.options, *(pair for pair in arguments.set if _is_option(pair))])
    changes = given(Settings, [pair for pair in arguments.set if not _is_option(pair)], "setting")
    batch = plan(options, changes, arguments.again)
    out = sys.stderr if arguments.json else sys.stdout
    for note in batch.notes:
        print(f"effbench: {note}", file=sys.stderr)
    if arguments.dry_run:
        _print_plan(batch, arguments.json)
        return 0
    try:
        check_models(batch.todo)
    except Unavailable as error:
        print(f"effbench: unavailable: {error}", file=sys.stderr)
        return 1
    print(progress.opening(batch), file=out)
    print(f"records: {options.folder.resolve()}", file=out, flush=True)
    for record in batch.done if arguments.json else []:
        _print_record(record)

    begin = time.monotonic()

    def print_record(event: Event) -> None:
        if arguments.json and event.record is not None:
            _print_record(event.record)

    store = Store(options.folder)
    executor = Local(batch.placement.jobs, options.timeout, batch.placement.threads)
    fresh, interrupted = progress.run_shown(batch.todo, store, executor, expect_seconds(batch), out, print_record)
    if interrupted:
        kept = f"{len(fresh)} of {len(batch.todo)} cells are done and kept in {options.folder.resolve()}"
        print(f"effbench: interrupted; {kept}, the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    print(progress.closing(fresh, time.monotonic() - begin, store), file=out)
    lost = find_lost(batch.done, store)
    by_identity = {record.cell.identity: record for record in [*batch.done, *fresh] if record not in lost}
    identities = [cell.job.cell.identity for cell in batch.cells]
    records = [by_identity[identity] for identity in identities if identity in by_identity]
    if not arguments.json and records:
        _print_tables(records, batch.suite.name, "rich" if out.isatty() else "md")
        print(f"records: {options.folder.resolve()}")
    if lost:
        gone = f"{len(lost)} records of cells that were done are gone from {options.folder.resolve()}"
        print(f"effbench: {gone}; the same command measures these again", file=sys.stderr)
    return int(bool(lost) or any(record.outcome in FAILED for record in records))


def _is_option(pair: str) -> bool:
    """Whether `--set` names what is an option of `run` and no setting of a suite: seeds, model, data."""
    from effbench.cells.suite import Settings

    name = pair.partition("=")[0]
    return name in RunOptions.__dataclass_fields__ and name not in Settings.__dataclass_fields__


def _print_tables(records: Sequence[Record], suite: str, style: str) -> None:
    """The summaries of a run, how to get the rest, and how its rows compare with the published ones."""
    from effbench.cells.stale import is_stale
    from effbench.report.pages import render
    from effbench.report.published import compare_with_published

    print(f"\n{render(list(records), suite, style, 'summary')}", end="")
    print(f"\n{compare_with_published(records, stale=is_stale)}")


def _print_plan(batch: Batch, as_json: bool) -> None:
    from effbench.cells.foresee import foresee
    from effbench.cli.progress import opening

    foreseen = [foresee(planned.job) if planned.done is None else None for planned in batch.cells]
    rows = [
        {
            "action": "run" if planned.done is None else "skip",
            "recipe": planned.job.cell.recipe,
            "seed": planned.job.cell.seed,
            "steps": planned.job.cell.steps,
            "why": planned.why if reason is None else f"{planned.why}, will be unsupported: {reason}",
            "identity": planned.job.cell.identity,
        }
        for planned, reason in zip(batch.cells, foreseen, strict=True)
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(opening(batch))
    print_columns([[str(row[key]) for key in ("action", "recipe", "seed", "why")] for row in rows])


def _print_record(record: Record) -> None:
    print(json.dumps(json.loads(record.to_json())), flush=True)


def _document_suites() -> str:
    """Help on settings and suite files, from the comments beside their fields."""
    from effbench.cells.suite import Settings, Stage, SuiteFile, Template

    return "\n\n".join(
        [
            document_options(Settings, "settings of a suite, each of which --set changes for one run:"),
            "A suite of your own is a YAML file, suite=FILE.yaml; `effbench show quant` and docs/suites.md show one.",
            document_options(SuiteFile, "keys of a suite file:", ":"),
            document_options(Template, "keys of each of its recipes:", ":"),
            document_options(Stage, "keys of each of its tiers:", ":"),
        ]
    )


COMMAND = Command(
    _run,
    "run a suite or a recipe; cells that are done are not run again",
    options=RunOptions,
    flags={
        "--again": "run all chosen cells anew, also those that are done",
        "--dry-run": "say what would run and why, and run nothing",
        "--json": "one record per line on stdout, nothing else",
    },
    repeated={"--set": "change a setting of the suite, such as --set window=256; any number of times"},
    notes=_document_suites,
)
