"""`effbench replay`: run the cell of a record again and say whether it is what it was."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from effbench.cli.command import INTERRUPTED, JSON, Command
from effbench.core.errors import Usage
from effbench.core.paths import PUBLISHED, RUNS
from effbench.core.usage import Positive, Seed, named_path, parse

if TYPE_CHECKING:
    from effbench.cells.job import Job
    from effbench.records.record import Record
    from effbench.records.store import Store
    from effbench.report.replay import Replay

CODES = {"reproduced": 0, "drifted": 1, "cannot run": 3}  # exit codes; 2 is wrong usage
TOLD = {"quality": "quality", "counts": "bytes and counts", "times": "times", "peaks": "peaks of memory"}
HELD = {"quality": "reproduce", "counts": "equal", "times": "within their intervals", "peaks": ""}


@dataclasses.dataclass
class ReplayOptions:
    """What `effbench replay` can be told."""

    tier: str | None = None  # of the record, where several have the name
    model: str | None = None  # likewise, its name as in a table
    seed: Seed | None = None  # likewise
    results: str | None = None  # folder in which names are looked up; by default the published ones
    runs: str = f"{RUNS}/replays"  # folder that keeps the fresh record
    model_at: str | None = None  # where the model lies, as in model= of `effbench run`; of records of one's own folder
    tokenizer_at: str | None = None  # likewise the tokenizer
    data_at: str | None = None  # likewise the data, such as text:FOLDER
    calibration_data_at: str | None = None  # likewise the data that methods calibrate and train on
    timeout: Positive = 3600.0  # seconds for the cell, waiting for the machine not counted


def _replay(arguments: argparse.Namespace) -> int:
    if arguments.record.partition("=")[0] in ReplayOptions.__dataclass_fields__:
        raise Usage(f"{arguments.record!r} is an option: name a record before it, `effbench replay RECORD`")
    options = parse(ReplayOptions, arguments.options)
    if options.results is None and PUBLISHED is None:
        raise Usage("results=: name the folder of the record; nothing is published with an installed package")
    results = PUBLISHED if options.results is None else named_path("results", options.results)
    runs = named_path("runs", options.runs)
    if PUBLISHED is not None and runs.resolve() == PUBLISHED.resolve():
        raise Usage(f"runs={options.runs}: holds what is published; choose another folder")

    from effbench.cells.replay import CannotRun, Whereabouts, restore
    from effbench.records.find import find_record
    from effbench.records.store import Store
    from effbench.report.replay import Replay, judge_replay

    assert results is not None
    record = find_record(arguments.record, results, tier=options.tier, model=options.model, seed=options.seed)
    Store(runs).check()
    where = Whereabouts(options.model_at, options.tokenizer_at, options.data_at, options.calibration_data_at)
    out = sys.stderr if arguments.json else sys.stdout
    print(_describe(record), file=out, flush=True)
    with tempfile.TemporaryDirectory(prefix="effbench-replay-") as scratch:
        try:
            job, gained = restore(record, Path(scratch), where)
        except CannotRun as error:
            return _tell(record, None, Replay("cannot run", str(error)), arguments.json)
        fresh = _run_again(job, record, Store(runs), options.timeout, out)
    if fresh is None:
        return INTERRUPTED
    return _tell(record, fresh, judge_replay(record, fresh, gained), arguments.json)


def _run_again(job: Job, record: Record, store: Store, timeout: float, out: TextIO) -> Record | None:
    """The fresh record of a job, as it stands in the store; None where a signal ended it."""
    from effbench.cells.local import Local
    from effbench.cli import progress
    from effbench.records.reader import read_record
    from effbench.records.record import Record

    while store.holds(Record(job.cell, "ok", attempt=job.attempt)):  # each replay is kept
        job = dataclasses.replace(job, attempt=job.attempt + 1)
    expected = {job.cell.identity: record.seconds} if record.seconds else {}
    executor = Local(1, timeout, job.cell.settings["threads"])
    records, interrupted = progress.run_shown([job], store, executor, expected, out)
    if interrupted or not records:
        print("effbench: interrupted", file=sys.stderr)
        return None
    (fresh,) = records
    path = store.folder(fresh.cell.suite, fresh.cell.suite_version) / fresh.name
    print(f"fresh record: {path}", file=out)
    return read_record(path) if path.is_file() else fresh


def _describe(record: Record) -> str:
    """One line that says which record is replayed, when it was measured and where."""
    cell = record.cell
    when = f", measured {record.started.partition('T')[0]}" if record.started else ""
    machine = record.environment.get("machine") or cell.settings.get("machine")
    where = f" on {machine}, host {record.host or 'not told'}" if machine else ""
    what = f"{cell.suite}/{cell.recipe} v{cell.suite_version}, {cell.tier} tier, model {cell.model}, seed {cell.seed}"
    return f"record {cell.identity}: {what}{when}{where}"


def _tell(record: Record, fresh: Record | None, replay: Replay, as_json: bool) -> int:
    if as_json:
        told = {"record": record.name, "fresh": None if fresh is None else fresh.name, **dataclasses.asdict(replay)}
        print(json.dumps(told, indent=1))
    else:
        print("\n".join(write_verdict(replay)))
    return CODES[replay.verdict]


def write_verdict(replay: Replay) -> list[str]:
    """The verdict in lines, the word itself last."""
    from effbench.report.replay import SHOWN

    lines = []
    for kind, name in TOLD.items():
        drifted = [drift for drift in replay.drifts if drift.kind == kind]
        judged, left = replay.judged.get(kind, 0), replay.left.get(kind, 0)
        if judged:
            exact = f", {replay.exact} to the last bit over {replay.items} items" if kind == "quality" else ""
            lines.append(f"{name}: {judged - len(drifted)} of {judged} metrics {HELD[kind]}{exact}")
        if left:
            of_times = "have no interval" if replay.same_host else "are of another host"
            why = "differ from run to run" if kind == "peaks" else of_times
            lines.append(f"{name}: {left} not judged, they {why}")
        lines += [f"  {drift}" for drift in drifted[:SHOWN]]
        if len(drifted) > SHOWN:
            lines.append(f"  and {len(drifted) - SHOWN} more; --json has all")
    if replay.differences:
        lines.append("what is different here:" if replay.verdict == "drifted" else "different here, without effect:")
        lines += [f"  {difference}" for difference in replay.differences]
    elif replay.verdict == "drifted":
        lines.append("no difference of host, versions or source is known")
    return [*lines, f"{replay.verdict}{f': {replay.why}' if replay.why else ''}"]


def _notes() -> str:
    return (
        "A record is a file, SUITE/ROW as data/dsir-100steps, an identity or a name of `effbench list records`. It is\n"
        "run by its own content: recipe with all parameters, settings, seed, threads; model and data must be those of\n"
        "the record by digest.\n\n"
        "exit code: 0 reproduced, 1 drifted, 2 wrong usage, 3 cannot run"
    )


COMMAND = Command(
    _replay,
    "run the cell of a record again, and say whether it reproduces",
    {"record": "a file, SUITE/ROW, or the identity of a published record"},
    ReplayOptions,
    JSON,
    notes=_notes,
)
