"""One cell: open a model, apply a recipe, take the probes. Runs in a process of its own.

Whatever happens becomes a record. A probe that fails costs its own readings only; the record then says what
failed and keeps what the others measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench import devices
from effbench.core.kinds import kind_of
from effbench.core.op import ran
from effbench.core.recipe import Recipe, parse
from effbench.core.record import Cell, Metric, OutcomeName, Record
from effbench.diagnosis import Failure, broken, diagnose
from effbench.sources import DataSource, Source

if TYPE_CHECKING:
    from effbench.nn.model_run import ModelRun
    from effbench.probes import Reading

Tell = Callable[..., None]  # news for whoever waits: phase=..., waiting=True, environment={...}

# Of several failures in one cell the one furthest right names the outcome.
SEVERITY: tuple[OutcomeName, ...] = ("refused", "unsupported", "diverged", "oom", "crashed")


@dataclasses.dataclass(frozen=True)
class Place:
    """A device to run cells on, with the lock file that all cells there share."""

    device: str  # cpu or cuda:N
    gate: Path
    visible: str = ""  # CUDA_VISIBLE_DEVICES of a process that sees this device alone

    def entered(self) -> Place:
        """This place for a process that works nowhere else and has not started CUDA: its first device, and the only."""
        if not self.visible:
            return self
        os.environ[devices.VISIBLE] = self.visible
        return dataclasses.replace(self, device="cuda:0")


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell with what it takes to run it here."""

    cell: Cell
    source: Source
    data: DataSource
    places: tuple[Place, ...]  # alike, any of them will do; one once the job has started
    attempt: int = 1

    def at(self, place: Place) -> Job:
        """This job with its place decided."""
        return dataclasses.replace(self, places=(place,))

    @property
    def place(self) -> Place:
        """Where the job runs."""
        (place,) = self.places
        return place


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

    def __init__(self, tell: Tell, device: str) -> None:
        self.metrics: dict[str, Metric] = {}
        self.samples: dict[str, list[Any]] = {}
        self.protocols: dict[str, str] = {}
        self.seconds: dict[str, float] = {}  # by phase
        self.shortfall: dict[str, Any] = {}  # of the first lack of memory: its phase and the bytes
        self.over = False  # whether nothing more can be computed in this process
        self._tell = tell
        self._device = device
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
            failure, why = diagnose(error), broken(self._device)
            if why:
                self.over = True
                told = failure.reason if why in failure.reason else f"{failure.reason}; {why}"
                reason = f"{told}: after this the process can compute nothing more on {self._device}"
                failure = dataclasses.replace(failure, outcome="crashed", reason=reason)
            self.fail(failure)

    def fail(self, failure: Failure) -> None:
        """Note a failure of the current phase."""
        self._reasons.setdefault((failure.outcome, failure.reason), []).append(self._phase)
        self._tracebacks += [failure.traceback] if failure.traceback else []
        if failure.outcome == "oom" and not self.shortfall:
            self.shortfall = {"phase": self._phase, **failure.shortfall}

    def add(self, reading: Reading) -> None:
        """Take in a reading; a number that is not finite is a failure instead."""
        for name, metric in reading.metrics.items():
            if math.isfinite(metric.value):
                self.metrics[name] = metric
            else:
                self.fail(Failure("diverged", f"{name} is not finite"))
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
    device, settings = job.place.device, job.cell.settings
    found = Findings(tell, device)
    environment: dict[str, Any] = {}
    log: dict[str, Any] = {}
    simulated = False
    gate = Gate(job.place.gate, tell)
    found.enter("wait")
    with gate.shared(), found.guard():
        found.enter("open")
        from effbench.nn.load import open_run
        from effbench.probes.environment import describe

        devices.check_room(device)
        _pin(device, settings["threads"], job.cell.seed)
        environment = describe(device)
        tell(environment=environment)
        run = open_run(job.source, job.data, device, settings["dtype"], job.cell.seed, settings)
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
        facts=facts(recipe, log.get("calibration_sequences", settings.get("calibration_sequences"))),
        log=log | {"phases": found.seconds} | ({"shortfall": found.shortfall} if found.shortfall else {}),
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
            if found.over:
                return
            found.enter(name)
            with found.guard():
                found.add(probes.take(name, run, settings))

    take([name for name in settings["probes"] if name not in probes.EXCLUSIVE])
    timing = [name for name in settings["probes"] if name in probes.EXCLUSIVE]
    if timing and not found.over:
        found.enter("wait")
        with gate.alone():
            take(timing)


def facts(recipe: Recipe, sequences: int | None) -> dict[str, Any]:
    """What the methods of a recipe declare of themselves, for the comparison table; they calibrate on `sequences`."""
    found: dict[str, list[str]] = {"type": [], "calibration_data": [], "weight_update": []}
    for step in recipe.steps:
        found["type"].append(getattr(step, "type", kind_of(type(step))))
        if hasattr(step, "needs"):
            needs: set[str] = step.needs
            gradients = " with gradients" if any(need.startswith("grad") for need in needs) else ""
            found["calibration_data"].append(f"{sequences} sequences{gradients}" if needs else "none")
        if hasattr(step, "weight_update"):
            found["weight_update"].append(step.weight_update)
    return {name: ", ".join(dict.fromkeys(values)) for name, values in found.items() if values}


def _pin(device: str, threads: int, seed: int) -> None:
    """Make arithmetic and chance the same whatever else the machine does, and `device` the one meant by default."""
    import numpy
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    torch.set_num_threads(threads)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
