"""What a person sees while cells run: a bar and a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from effbench.cells.local import Event, Local
from effbench.cli.remaining import Remaining
from effbench.records.record import OUTCOMES, Record

if TYPE_CHECKING:
    from rich.console import RenderableType

    from effbench.cells.job import Job
    from effbench.cells.plan import Batch
    from effbench.records.store import Store

SPARSE = 60.0  # seconds between plain lines that say how far cells are
STARTING = "starting: libraries are loaded once, which takes 10 to 30 s"
DOING = {  # phases that do not say by themselves what happens
    "wait": "waiting for other cells: one that measures speed runs alone",
    "open": "loading the model",
    "finish": "packing the model",
}


def opening(batch: Batch) -> str:
    """One line that says what is about to run, and where."""
    placement, todo = batch.placement, len(batch.todo)
    budget = f", budget {batch.budget_minutes:g} min" if batch.budget_minutes else ""
    cells = f"{len(batch.cells)} cell{'s' * (len(batch.cells) != 1)}"
    return (
        f"suite {batch.suite.name} v{batch.suite.version}, tier {batch.tier}{budget}, on {placement.device} "
        f"({placement.machine}): {cells}, {len(batch.cells) - todo} done, {todo} to run, {placement.jobs} at a time"
    )


def closing(records: list[Record], seconds: float, store: Store) -> str:
    """One line that counts the outcomes, and one for each traceback with the file that holds it."""
    count = Counter(record.outcome for record in records)
    outcomes = ", ".join(f"{count[outcome]} {outcome}" for outcome in OUTCOMES if count[outcome])
    lines = [f"{len(records)} cells in {_duration(seconds)}: {outcomes or 'nothing to do'}"]
    for record in records:
        if record.traceback:
            path = store.folder(record.cell.suite, record.cell.suite_version) / record.name
            lines.append(f"traceback of {record.cell.recipe}, seed {record.cell.seed}: {path}")
    return "\n".join(lines)


def line(record: Record, note: str = "") -> str:
    """One line for a cell that ended; `note` says where its record comes from."""
    reason = f": {record.reason.splitlines()[0]}" if record.reason else ""
    took = f"{record.outcome} in {_duration(record.seconds)}{f' ({note})' if note else ''}"
    return f"{record.cell.recipe} seed {record.cell.seed}: {took}{reason}"


def describe(event: Event) -> str:
    """What a cell does, and how far it has come."""
    doing = DOING.get(event.phase, event.phase)
    if event.progress is None:
        return doing
    unit, done, total = event.progress
    return f"{doing}: {unit} {done} of {total}"


def left(remaining: Remaining) -> str:
    """How long it will still take, in words; empty while nothing is known."""
    seconds = remaining.seconds()
    return "" if seconds is None else f"about {_duration(seconds)} left"


def run_shown(
    jobs: Sequence[Job],
    store: Store,
    executor: Local,
    expected: Mapping[str, float],
    out: TextIO,
    also: Callable[[Event], None] = lambda _: None,
) -> tuple[list[Record], bool]:
    """`run_cells` with news of it on `out`, and whatever else is to be done with them.

    `expected` has seconds that cells took before, by identity.
    """
    from effbench.cells.run import run_cells

    display = (Live if out.isatty() else Lines)(Remaining(jobs, expected, executor.jobs), len(jobs), out)

    def watch(event: Event) -> None:
        display.watch(event)
        also(event)

    with display:
        return run_cells(jobs, store, executor, watch)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


class Lines:
    """One plain line for each cell that ends, and now and then one that says how far the others are."""

    def __init__(self, remaining: Remaining, total: int, out: TextIO) -> None:
        self._remaining = remaining
        self._total = total
        self._out = out
        self._ended = 0
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        if self._total:
            print("; ".join(filter(None, [STARTING, left(self._remaining)])), file=self._out, flush=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def watch(self, event: Event) -> None:
        """Take in news of a job."""
        self._remaining.watch(event)
        if event.record is not None:
            self._ended += 1
            print(f"[{self._ended}/{self._total}] {line(event.record, event.note)}", file=self._out, flush=True)
        elif time.monotonic() - self._told < SPARSE:
            return
        else:
            cell = event.job.cell
            told = [f"{cell.recipe} seed {cell.seed}: {describe(event)}", left(self._remaining)]
            print("; ".join(filter(None, told)), file=self._out, flush=True)
        self._told = time.monotonic()


class Live(Lines):
    """A bar with the time that is left, and a table of the cells at work."""

    def __init__(self, remaining: Remaining, total: int, out: TextIO) -> None:
        super().__init__(remaining, total, out)
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._console = Console(file=out)
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("cells", total=total, left="")
        self._live = RichLive(get_renderable=self._render, console=self._console, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def watch(self, event: Event) -> None:
        self._remaining.watch(event)
        if event.record is None:
            return
        self._ended += 1
        style = None if event.record.outcome == "ok" else "yellow"
        self._console.print(line(event.record, event.note), style=style, markup=False)
        self._bar.advance(self._task)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table

        table = Table("cell", "seed", "doing", "for", "in all", box=None, padding=(0, 2, 0, 0))
        now = time.monotonic()
        working = list(self._remaining.working.values())
        for event, since, entered in working:
            cell = event.job.cell
            times = f"{now - entered:.0f} s", f"{now - since:.0f} s"
            table.add_row(cell.recipe, str(cell.seed), describe(event), *times)
        self._bar.update(self._task, left=left(self._remaining))
        return Group(table if working or self._ended else STARTING, self._bar)
