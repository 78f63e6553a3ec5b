"""One cell: open a model, apply a recipe, take the probes. Runs in a process of its own.

Whatever happens becomes a record. A probe that fails costs its own readings only; the record then says what
failed and keeps what the others measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import math
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.core.errors import Outcome, Usage
from effbench.core.kinds import kind_of
from effbench.core.op import ran
from effbench.core.recipe import Recipe, parse
from effbench.core.record import Cell, Metric, OutcomeName, Record
from effbench.sources import DataSource, Source

if TYPE_CHECKING:
    from effbench.nn.model_run import ModelRun
    from effbench.probes import Reading

Tell = Callable[..., None]  # news for whoever waits: phase=..., waiting=True, environment={...}

# Of several failures in one cell the one furthest right names the outcome.
SEVERITY: tuple[OutcomeName, ...] = ("refused", "unsupported", "diverged", "oom", "crashed")
NO_MEMORY = ("can't allocate memory", "not enough memory")  # what torch's allocator on a processor says


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell with what it takes to run it here."""

    cell: Cell
    source: Source
    data: DataSource
    device: str  # cpu or cuda:N
    gate: Path  # lock file shared by all cells on the device
    attempt: int = 1


class Gate:
    """Cells work side by side; a probe that times something has the device to itself.

    A lock on one file per device: shared while working, exclusive while timing. Any number of programs on one
    machine may use it, and it opens when a process dies.
    """

    def __init__(self, path: Path, tell: Tell) -> None:
        self._path = path
        self._tell = tell

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Work beside other cells, once none of them is timing."""
        self._file = os.open(self._path, os.O_RDONLY)
        try:
            self._lock(fcntl.LOCK_SH)
            yield
        finally:
            os.close(self._file)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside `shared`, at its end: wait until no other cell works, and keep them all waiting."""
        self._lock(fcntl.LOCK_EX)
        yield

    def _lock(self, mode: int) -> None:
        try:
            fcntl.flock(self._file, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            self._tell(waiting=True)
            fcntl.flock(self._file, mode)
            self._tell(waiting=False)


class Findings:
    """What a cell has found so far: readings, failures, and the phase it is in."""

    def __init__(self, tell: Tell) -> None:
        self.metrics: dict[str, Metric] = {}
        self.samples: dict[str, list[Any]] = {}
        self.protocols: dict[str, str] = {}
        self.seconds: dict[str, float] = {}  # by phase
        self._tell = tell
        self._phase = ""
        self._since = time.monotonic()
        self._reasons: dict[tuple[OutcomeName, str], list[str]] = {}  # (outcome, reason): phases
        self._tracebacks: list[str] = []

    def enter(self, phase: str) -> None:
        """Close the phase before and open another; an empty name opens none."""
        now = time.monotonic()
        if self._phase:
            self.seconds[self._phase] = round(self.seconds.get(self._phase, 0.0) + now - self._since, 3)
        self._phase, self._since = phase, now
        if phase:
            self._tell(phase=phase)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn an exception into a failure of the current phase."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self.fail(*_diagnose(error))

    def fail(self, outcome: OutcomeName, reason: str, trace: str = "") -> None:
        """Note a failure of the current phase."""
        self._reasons.setdefault((outcome, reason), []).append(self._phase)
        self._tracebacks += [trace] if trace else []

    def add(self, reading: Reading) -> None:
        """Take in a reading; a number that is not finite is a failure instead."""
        for name, metric in reading.metrics.items():
            if math.isfinite(metric.value):
                self.metrics[name] = metric
            else:
                self.fail("diverged", f"{name} is not finite")
        self.samples |= reading.samples
        self.protocols |= reading.protocols

    @property
    def outcome(self) -> OutcomeName:
        """`ok`, or the worst failure."""
        return max((outcome for outcome, _ in self._reasons), key=SEVERITY.index, default="ok")

    @property
    def reason(self) -> str:
        """Every failure with the phases it happened in."""
        return "; ".join(f"{', '.join(phases)}: {reason}" for (_, reason), phases in self._reasons.items())

    @property
    def traceback(self) -> str:
        """Tracebacks of crashes."""
        return "\n".join(self._tracebacks)


def execute(job: Job, tell: Tell = lambda **_: None) -> Record:
    """Run a cell in this process and give its record; `tell` is called with news while it goes on."""
    started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
    recipe = parse(job.cell.steps, job.cell.recipe)
    found = Findings(tell)
    environment: dict[str, Any] = {}
    log: dict[str, Any] = {}
    simulated = False
    gate = Gate(job.gate, tell)
    found.enter("wait")
    with gate.shared(), found.guard():
        found.enter("open")
        from effbench.nn.load import open_run
        from effbench.probes.environment import describe

        _pin(job.cell.settings["threads"], job.cell.seed)
        environment = describe(job.device)
        tell(environment=environment)
        settings = job.cell.settings
        run = open_run(job.source, job.data, job.device, settings["dtype"], job.cell.seed, settings)
        log = run.log
        try:
            _apply(recipe, run, found)
            simulated = any(getattr(module, "simulated", False) for module in run.model.modules())
            _measure(run, settings, gate, found)
        finally:
            run.close()
    found.enter("")
    return Record(
        cell=job.cell,
        outcome=found.outcome,
        reason=found.reason,
        traceback=found.traceback,
        attempt=job.attempt,
        simulated=simulated,
        metrics=found.metrics,
        samples=found.samples,
        protocols=found.protocols,
        kernels=ran(),
        facts=facts(recipe, job.cell.settings),
        log=log | {"phases": found.seconds},
        environment=environment,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - begin - found.seconds["wait"], 3),
    )


def _apply(recipe: Recipe, run: ModelRun, found: Findings) -> None:
    """The steps in order, each with its time and the most memory it held."""
    from effbench.probes.peak import PeakMemory

    for step in recipe.steps:
        found.enter(str(step))
        begin = time.perf_counter()
        with PeakMemory(run.device) as peak:
            run.apply(step)
        seconds = time.perf_counter() - begin
        run.log["steps"].append({"step": str(step), "seconds": seconds, "peaks": peak.bytes})
    found.enter("finish")
    run.finish(recipe_is_empty=not recipe.steps)


def _measure(run: ModelRun, settings: dict[str, Any], gate: Gate, found: Findings) -> None:
    """Take the probes, those that need an idle device last."""
    from effbench import probes

    def take(names: list[str]) -> None:
        for name in names:
            found.enter(name)
            with found.guard():
                found.add(probes.take(name, run, settings))

    take([name for name in settings["probes"] if name not in probes.EXCLUSIVE])
    timing = [name for name in settings["probes"] if name in probes.EXCLUSIVE]
    if timing:
        found.enter("wait")
        with gate.alone():
            take(timing)


def facts(recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """What the methods of a recipe declare of themselves, for the comparison table."""
    found: dict[str, list[str]] = {"type": [], "calibration_data": [], "weight_update": []}
    for step in recipe.steps:
        found["type"].append(getattr(step, "type", kind_of(type(step))))
        if hasattr(step, "weight_update"):
            sequences = f"{settings.get('calibration_sequences')} sequences"
            needs: set[str] = getattr(step, "needs", set())
            gradients = " with gradients" if any(need.startswith("grad") for need in needs) else ""
            found["calibration_data"].append(sequences + gradients if needs else "none")
            found["weight_update"].append(step.weight_update)
    return {name: ", ".join(dict.fromkeys(values)) for name, values in found.items() if values}


def _pin(threads: int, seed: int) -> None:
    """Make arithmetic and chance the same whatever else the machine does."""
    import numpy
    import torch

    torch.set_num_threads(threads)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _diagnose(error: BaseException) -> tuple[OutcomeName, str, str]:
    """Outcome, reason and traceback (of crashes only) of an exception."""
    message = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, Outcome):
        return error.name, str(error), ""  # type: ignore[return-value]
    if isinstance(error, Usage):  # seen only with the model in hand
        return "refused", str(error), ""
    if isinstance(error, FloatingPointError):
        return "diverged", message or "a number is not finite", ""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "oom", message or "out of memory", ""
    if isinstance(error, RuntimeError) and any(words in message for words in NO_MEMORY):
        return "oom", message, ""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = "no space left on the disk"
    return (
        "crashed",
        f"{type(error).__name__}: {message}".removesuffix(": "),
        "".join(traceback.format_exception(error)),
    )
