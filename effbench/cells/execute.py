"""One cell: open a model, apply a recipe, take the probes. Runs in a process of its own.

Whatever happens becomes a record. A probe that fails costs its own readings only; the record then says what
failed and keeps what the others measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any

from effbench.cells.findings import Findings
from effbench.cells.job import Job
from effbench.core.errors import Diverged, Refused, Unsupported
from effbench.core.files import replace_file
from effbench.core.kinds import kind_of
from effbench.core.method import Method, Need
from effbench.core.recipe import Recipe, parse
from effbench.core.run import RunLog, TuningPoint
from effbench.machine import devices
from effbench.machine.gate import Gate, Tell
from effbench.ops import backend_calls
from effbench.records.record import Record

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

TUNED_AT = 0  # the seed at which points of a grid are tried: one choice for all seeds, whose spread is then the row's


def execute(job: Job, tell: Tell = lambda **_: None) -> Record:
    """Run a cell in this process and give its record; `tell` is called with news while it goes on."""
    started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
    recipe = parse(job.cell.steps, job.cell.recipe)
    device, settings = job.place.device, job.cell.settings
    findings = Findings(tell, device)
    environment: dict[str, Any] = {}
    log = RunLog()
    simulated = False
    kernels: dict[str, dict[str, int]] = {}
    proof: dict[str, Any] = {}
    gate = Gate(job.place.gate, tell) if not job.rank else None  # what the first of several processes waits for, all do
    findings.enter("wait")
    with gate.shared() if gate else contextlib.nullcontext(), findings.guard():
        findings.enter("open")
        from effbench.machine.environment import describe

        devices.check_room(device)
        environment = describe(device)
        tell(environment=environment)
        tuning = list(_tune(job, gate, findings)) if "tune" in settings else []
        if tuning:
            recipe = parse(min(tuning, key=_rank)["steps"], job.cell.recipe)
        run = open_cell(job)
        log = run.log
        log.tuning = tuning
        run.folder, run.cache = job.scratch, job.cache
        run.progress = functools.partial(_go_on, run, gate, findings)
        if gate:
            run.alone = functools.partial(_wait_alone, run, gate, findings)
        try:
            _apply(recipe if gate else recipe.trained_part, run, findings)
            if job.ranks > 1:
                _part()
            if gate:
                run.finish(recipe_is_empty=not recipe.steps)
                emulates = any(getattr(module, "simulated", False) for module in run.model.modules())
                simulated = emulates or log.simulated
                applied = backend_calls()
                _measure(run, job, findings)
                kernels = backend_calls()
                proof = _prove(run, simulated, applied, findings)
        finally:
            run.close()
    findings.enter("")
    shortfall = {"shortfall": findings.shortfall} if findings.shortfall else {}
    return Record(
        cell=job.cell,
        outcome=findings.outcome,
        reason=_label_steps(findings.reason, recipe),
        traceback=findings.traceback,
        attempt=job.attempt,
        simulated=simulated,
        metrics=findings.metrics,
        samples=findings.samples | {f"chosen by {step}": examples for step, examples in log.chosen.items()},
        protocols=findings.protocols,
        kernels=kernels or backend_calls(),
        facts=facts(
            recipe,
            log.calibration_sequences or settings.get("calibration_sequences"),
            len(log.tuning),
            log.near_duplicates or 0,
        ),
        log=log.to_json() | {"phases": findings.seconds} | shortfall | ({"proof": proof} if proof else {}),
        environment=environment,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - begin - findings.seconds["wait"], 3),
    )


def _tune(job: Job, gate: Gate | None, findings: Findings) -> list[TuningPoint]:
    """Every point of the job's grid, tried at one seed: cells of other seeds read what the cell of that seed found.

    Raises `Diverged` where none has a finite loss.
    """
    first = dataclasses.replace(job.cell, seed=TUNED_AT)
    kept = None
    if job.cache is not None and job.ranks == 1:  # else one rank might find what another does not
        kept = job.cache / "tuned" / f"{first.identity}.json"
    if kept is not None and job.cell.seed != TUNED_AT and kept.is_file():
        found: list[TuningPoint] = json.loads(kept.read_bytes())
    else:
        found = list(_try_points(dataclasses.replace(job, cell=first), gate, findings))
        if kept is not None:
            replace_file(kept, json.dumps(found).encode())
    if all(point["loss"] is None for point in found):
        raise Diverged(f"the loss is not finite at any of {len(found)} points of the grid")
    return found


def _try_points(job: Job, gate: Gate | None, findings: Findings) -> Iterator[TuningPoint]:
    """Every point with its validation loss, what probes of tasks say of it, and what it cost.

    Points are tried one after the other, so that a cell has what all of them took.
    """
    from effbench import probes
    from effbench.nn.train.windows import find_loss

    points = job.cell.settings["tune"]
    for number, steps in enumerate(points, 1):
        begin = time.monotonic()
        run = open_cell(job)
        run.folder = None if job.scratch is None else job.scratch / f"point-{number}"
        run.cache = job.cache
        run.progress = functools.partial(_go_on, run, gate, findings, at=f"point {number} of {len(points)}, ")
        loss: float | None = None
        metrics: dict[str, float] = {}
        try:
            for step in parse(steps).steps:
                findings.enter(step.label)
                run.apply(step)
            run.finish()
            loss = find_loss(run)
            for name in sorted(probes.TASK.intersection(job.probes)):
                reading = probes.take(name, run, job.cell.settings)
                metrics |= {key: metric.value for key, metric in reading.metrics.items()}
        except Diverged:
            pass
        finally:
            run.close()
        tokens = sum(report["tokens"] for report in run.log.fits)
        seconds = time.monotonic() - begin - run.waited
        yield {"steps": steps, "loss": loss, "seconds": seconds, "tokens": tokens, "metrics": metrics}


def _part() -> None:
    """Have this process be one by itself from now on: the others have nothing more to do."""
    from torch import distributed

    distributed.destroy_process_group()


def _rank(point: TuningPoint) -> float:
    """Its validation loss; the worst where that is not finite."""
    return math.inf if point["loss"] is None else point["loss"]


def _label_steps(reason: str, recipe: Recipe) -> str:
    """A reason with its steps as a person writes them: in whole they name folders of this machine."""
    for step in recipe.steps:
        reason = reason.replace(str(step), step.label)
    return reason


def open_cell(job: Job) -> ModelRun:
    """The run of a job in this process, ready for its recipe; arithmetic and chance are those of its cell."""
    from effbench.nn.files.load import open_run

    device, cell = job.place.device, job.cell
    _pin(device, cell.settings["threads"], cell.seed)
    return open_run(job.source, job.data, device, cell.settings["dtype"], cell.seed, cell.settings)


def _apply(recipe: Recipe, run: ModelRun, findings: Findings) -> None:
    """The steps in order, each with its time and the most memory it held."""
    from effbench.machine.peak import PeakMemory

    for step in recipe.steps:
        findings.enter(step.label)
        begin = time.perf_counter() - run.waited
        with PeakMemory(run.device) as peak:
            run.apply(step)
        seconds = time.perf_counter() - run.waited - begin
        run.log.steps.append({"step": step.label, "seconds": seconds, "peaks": peak.bytes})
    findings.enter("finish")


def _go_on(
    run: ModelRun, gate: Gate | None, findings: Findings, unit: str, done: int, total: int, at: str = ""
) -> None:
    """Tell how far the run has come, and let those pass who wait to have the machine to themselves."""
    findings.progress(at + unit, done, total)
    if gate and gate.wanted:
        with _waiting(run, findings):
            gate.give_way()


@contextlib.contextmanager
def _wait_alone(run: ModelRun, gate: Gate, findings: Findings) -> Iterator[None]:
    """The machine to itself inside."""
    with contextlib.ExitStack() as stack:
        with _waiting(run, findings):
            stack.enter_context(gate.alone())
        yield


@contextlib.contextmanager
def _waiting(run: ModelRun, findings: Findings) -> Iterator[None]:
    """Inside it waits: that time is no step's own."""
    phase, begin = findings.phase, time.monotonic()
    findings.enter("wait")
    try:
        yield
    finally:
        findings.enter(phase)
        run.waited += time.monotonic() - begin


def _measure(run: ModelRun, job: Job, findings: Findings) -> None:
    """Take the probes of a job, those that need an idle device last."""
    from effbench import probes

    def take(names: list[str]) -> None:
        for name in names:
            if findings.over:
                return
            findings.enter(name)
            with findings.guard():
                findings.add(probes.take(name, run, job.cell.settings))

    take([name for name in job.probes if name not in probes.EXCLUSIVE])
    timing = [name for name in job.probes if name in probes.EXCLUSIVE]
    if timing and not findings.over:
        with run.alone():
            take(timing)


def _prove(run: ModelRun, simulated: bool, applied: dict[str, dict[str, int]], findings: Findings) -> dict[str, Any]:
    """Which kernels ran since the recipe was applied, in plain values; empty where a model cannot infer or the process
    is at its end. What was measured stands, whatever becomes of the trace.
    """
    if findings.over:
        return {}
    from effbench.cells.prove import count_calls, prove

    try:
        return dataclasses.asdict(prove(run, simulated, count_calls(applied)))
    except Exception as error:
        return {} if isinstance(error, (Unsupported, Refused)) else {"why": f"not traced: {type(error).__name__}"}


def facts(recipe: Recipe, sequences: int | None, tried: int = 0, duplicates: int = 0) -> dict[str, Any]:
    """What the methods of a recipe declare of themselves, for the comparison table; they calibrate on `sequences`.
    `tried` is the number of settings of which this recipe is the best, `duplicates` that of held-out documents that
    were trained on, nearly.

    Columns of the table are text; `caveats` is a list, a footnote each.
    """
    steps = recipe.steps
    columns = {
        "type": [step.type or kind_of(type(step)) for step in steps],
        "calibration_data": [describe_calibration(step.needs, sequences) for step in steps if step.needs is not None],
        "weight_update": list_updates(steps),
        "multi_task": ["swap" for step in steps if step.swaps()],
        "composition": ["stack" for step in steps if step.stacks],
        "merge": ["yes" for step in steps if step.merges],
    }
    told: dict[str, Any] = {name: ", ".join(dict.fromkeys(values)) for name, values in columns.items() if values}
    caveats = [f"{step.short_key}: {caveat}" for step in steps for caveat in step.caveats]
    if duplicates:
        caveats.insert(0, f"{duplicates} held-out documents have a near-duplicate among those trained on")
    if tried:
        caveats.insert(0, f"the best of {tried} settings by validation loss")
    return told | ({"caveats": list(dict.fromkeys(caveats))} if caveats else {})


def list_updates(steps: Sequence[Method]) -> list[str]:
    """What the steps do to weights that stay; a fit only where no step that acts through it has said what it trains."""
    updates, told = [], False
    for step in steps:
        if step.weight_update and not (step.consumes and told):
            updates.append(step.weight_update)
        told = not step.consumes and (told or (step.trains and bool(step.weight_update)))
    return updates


def describe_calibration(needs: Set[Need], sequences: int | None) -> str:
    """The calibration data of a step that takes these statistics."""
    gradients = " with gradients" if any(need.startswith("grad") for need in needs) else ""
    return f"{sequences} sequences{gradients}" if needs else "none"


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
