"""`effbench verify`: published numbers against what is measured here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, TextIO

from effbench.cells.options import DTYPES
from effbench.cli.command import INTERRUPTED, JSON, Command, print_columns
from effbench.core.errors import Unavailable, Usage
from effbench.core.paths import RUNS
from effbench.core.usage import Count, Positive, list_some, matches_any, named_path, nearest, one_of, parse

if TYPE_CHECKING:
    from effbench.cells.options import RunOptions
    from effbench.cells.papers import Entry
    from effbench.cells.plan import Batch
    from effbench.cells.verify import State
    from effbench.records.record import Record

CANNOT = 3  # exit code where nothing is off, and something could not be measured


@dataclasses.dataclass
class VerifyOptions:
    """What `effbench verify` can be told."""

    paper: str | None = None  # only the numbers of this paper file: its name, or a FILE.yaml of your own
    entries: str | None = None  # only these: names or patterns, separated by commas
    method: str | None = None  # only numbers of this method
    model: str | None = None  # where the model lies, as in model= of `effbench run`; by default its name
    record: str | None = None  # a record that is there, in place of a run: a file, SUITE/ROW of runs=, or an identity
    device: str | None = None  # as in `effbench run`
    dtype: str | None = None  # as in `effbench run`
    threads: Count | None = None  # as in `effbench run`
    timeout: Positive = 86400.0  # seconds for one cell, waiting for the machine not counted
    runs: str = RUNS  # folder of own records; cells that are done there are not run again

    @property
    def chooses(self) -> bool:
        """Whether any number is named, which is then to be measured."""
        return any(value is not None for value in (self.paper, self.entries, self.method))


def _verify(arguments: argparse.Namespace) -> int:
    from effbench.cells.papers import load, read_without

    options = parse(VerifyOptions, arguments.options)
    one_of("dtype", options.dtype, DTYPES)
    if arguments.without:
        print_columns(read_without().items())
        return 0
    if not options.chooses and (options.model or options.record):
        raise Usage("model= and record= are for numbers that are named: add paper=, entries= or method=")
    entries = _choose(load(options.paper), options)
    _run_options(options, None).check()
    out = sys.stderr if arguments.json else sys.stdout
    if options.record is not None:
        states = [_hold_against(entries, options.record, options)]
    else:
        states = []
        for entry in entries:
            state = _look(entry, options, options.chooses, arguments.again, out)
            if state is None:
                print("effbench: interrupted; the same command goes on from there", file=sys.stderr)
                return INTERRUPTED
            states.append(state)
            if options.chooses and not arguments.json:
                print(f"{entry.name}: {state}", flush=True)
    if arguments.json:
        print(json.dumps([_to_json(state) for state in states], indent=1))
    elif options.record is not None:
        print(f"{states[0].entry.name}: {states[0]}")
    elif not options.chooses:
        _print_list(states)
    return _code(states) if options.chooses else 0


def _choose(entries: list[Entry], options: VerifyOptions) -> list[Entry]:
    """The entries that the options name. Raises `Usage` where there is none, and where model= would mean several."""
    if options.method is not None:
        methods = {entry.number.method for entry in entries}
        if options.method not in methods:
            from effbench.cells.papers import read_without

            reason = read_without().get(options.method)
            hint = f": {reason}" if reason else nearest(options.method, methods)
            raise Usage(f"method={options.method}: no number of it is known{hint}")
        entries = [entry for entry in entries if entry.number.method == options.method]
    if options.entries is not None:
        known = entries
        entries = []
        for pattern in map(str.strip, options.entries.split(",")):
            found = [entry for entry in known if matches_any(entry.name, [pattern, f"*/{pattern}"])]
            if not found:
                raise Usage(f"entries={options.entries}: none is called {pattern!r}{nearest(pattern, _names(known))}")
            entries += [entry for entry in found if entry not in entries]
    models = sorted({entry.number.model for entry in entries})
    if options.model is not None and len(models) > 1:
        raise Usage(f"model={options.model}: the numbers are of {list_some(models)}: choose those of one with entries=")
    if options.record is not None and len(entries) > 1:
        raise Usage(f"record= is held against one number, and there are {len(entries)}: choose one with entries=")
    return entries


def _names(entries: list[Entry]) -> list[str]:
    return [entry.number.name for entry in entries]


def _run_options(options: VerifyOptions, entry: Entry | None) -> RunOptions:
    """What `effbench run` would be told. Raises `Usage`."""
    from effbench.cells.options import RunOptions
    from effbench.cells.papers import OWN

    told = RunOptions(
        recipe="", device=options.device, dtype=options.dtype, threads=options.threads, results=options.runs
    )
    if entry is None:
        return told
    tokenizer = None if entry.protocol.tokenizer == OWN else entry.protocol.tokenizer
    return dataclasses.replace(told, data=entry.protocol.data, tokenizer=tokenizer, tier="full")


def _look(entry: Entry, options: VerifyOptions, run: bool, again: bool, out: TextIO) -> State | None:
    """What is known of an entry, once its cell has run if it is to `run`; None where a signal ended that."""
    from effbench.cells.verify import State, find_obstacle, judge, name_model

    if (obstacle := find_obstacle(entry, options.model)) is not None:
        return obstacle
    try:
        batch = _plan(entry, options, name_model(entry, options.model), again and run)
    except Unavailable as error:
        return State(entry, "cannot run", str(error))
    if batch.todo and not run:
        return State(entry, "not run yet", "the model is at hand")
    records = batch.done
    if batch.todo:
        fresh = _run(batch, options, out)
        if fresh is None:
            return None
        records = [*records, *fresh]
    found = {record.cell.identity: record for record in records}
    baseline, *others = (found.get(cell.job.cell.identity) for cell in batch.cells)
    record = others[0] if others else baseline
    assert record is not None
    return judge(entry, record, baseline if others else None, options.model)


def _plan(entry: Entry, options: VerifyOptions, model: str, again: bool) -> Batch:
    """The cell of an entry and that of the unchanged model. Raises `Unavailable` where that cannot be."""
    from effbench.cells.plan import plan_recipes
    from effbench.core.recipe import parse as parse_recipe
    from effbench.machine.placement import place

    told = dataclasses.replace(_run_options(options, entry), model=model)
    place(told.device, told.threads)  # what is wrong with these is wrong usage
    steps = entry.number.steps or ""
    try:
        return plan_recipes(told, [parse_recipe(steps, steps or None)], entry.settings, again)
    except Usage as error:  # such as a window that the model is too short for
        raise Unavailable(str(error)) from None


def _run(batch: Batch, options: VerifyOptions, out: TextIO) -> list[Record] | None:
    """Fresh records of what a batch has to run; None where a signal ended it."""
    from effbench.cells.local import Local
    from effbench.cells.plan import expect_seconds
    from effbench.cli import progress
    from effbench.records.store import Store

    executor = Local(batch.placement.jobs, options.timeout, batch.placement.threads)
    store = Store(named_path("runs", options.runs))
    records, interrupted = progress.run_shown(batch.todo, store, executor, expect_seconds(batch), out)
    return None if interrupted else records


def _hold_against(entries: list[Entry], name: str, options: VerifyOptions) -> State:
    """The verdict on the one entry by a record that is there. Raises `Usage`."""
    from effbench.cells.verify import State, judge, list_mismatches
    from effbench.records.find import find_record

    (entry,) = entries
    record = find_record(name, named_path("runs", options.runs))
    if entry.number.lacks:
        return State(entry, "cannot run", f"effbench lacks {entry.number.lacks}")
    if wrong := list(list_mismatches(entry)):
        return State(entry, "refused", f"another protocol: {'; '.join(wrong)}")
    return judge(entry, record, None, options.model)


def _print_list(states: list[State]) -> None:
    """A line for each entry, and how many there are of each state."""
    from effbench.cells.papers import read_without

    rows = [("number", "of", "where", "published", "state")]
    for state in states:
        number = state.entry.number
        where = f"{state.entry.source}, {number.table}"
        rows.append((state.entry.name, number.method, where, f"{number.value:g}", str(state)))
    print_columns(rows)
    count = Counter(state.verdict for state in states)
    told = ", ".join(f"{number} {verdict}" for verdict, number in count.items())
    without = len(read_without())
    print(f"{len(states)} numbers: {told}; {without} methods have none: `effbench verify --without` says why")


def _code(states: list[State]) -> int:
    """0 where all are reproduced, 1 where one is off, else `CANNOT`."""
    verdicts = {state.verdict for state in states}
    return 1 if "off" in verdicts else 0 if verdicts <= {"reproduced"} else CANNOT


def _to_json(state: State) -> dict[str, object]:
    body = dataclasses.asdict(state)
    return {"name": state.entry.name, "state": str(state), **body}


def _notes() -> str:
    return (
        "Without options all numbers are listed with what is known of them here; nothing runs. Numbers that are named\n"
        "are measured where their model is at hand: a folder, model=PATH, or the Hub's cache. A protocol that is not\n"
        "the paper's is refused. What a paper file holds: docs/reproduce.md.\n\n"
        "exit code: 0 all reproduced, 1 one is off, 2 wrong usage, 3 some could not be measured"
    )


COMMAND = Command(
    _verify,
    "hold published numbers against what is measured here",
    options=VerifyOptions,
    flags=JSON
    | {
        "--again": "measure anew what is done",
        "--without": "list the methods of which no published number is known, and why",
    },
    notes=_notes,
)
