"""What worker processes do in tests instead of measuring models. Imported by them, so it stands on its own."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

from effbench.cells.job import Job
from effbench.core.run import RunLog
from effbench.machine.gate import Gate, Tell
from effbench.records.metric import Metric
from effbench.records.record import Record

HERE = Path(__file__).parent


def quick(job: Job, tell: Tell) -> Record:
    """A short cell that always says the same."""
    tell(phase="work")
    time.sleep(float(job.cell.settings.get("seconds", 0.1)))
    return Record(
        job.cell,
        "ok",
        attempt=job.attempt,
        metrics={"length": Metric(len(job.cell.recipe))},
        protocols={"length": "characters of the row's name"},
        environment={"machine": "none"},
    )


def chatty(job: Job, tell: Tell) -> Record:
    """A cell that writes to both its outputs."""
    print("noise on stdout")
    os.write(1, b"noise below python\n")
    print("noise on stderr", file=sys.stderr)
    return quick(job, tell)


def unluckily(job: Job, tell: Tell) -> Record:
    """A cell that fails at its first attempt."""
    if job.attempt == 1:
        raise RuntimeError("not today")
    return quick(job, tell)


def timing(job: Job, tell: Tell) -> Record:
    """A cell that works for a while, then times something alone; notes when it did what in `seen`."""
    seen = Path(job.cell.settings["seen"])
    gate = Gate(job.place.gate, tell)
    with gate.shared():
        begin = time.monotonic()
        time.sleep(random.Random(job.cell.recipe).uniform(0.05, 0.4))
        worked = time.monotonic()
        with gate.alone():
            alone = time.monotonic()
            time.sleep(0.2)
            ended = time.monotonic()
    (seen / job.cell.recipe).write_text(f"{begin} {worked} {alone} {ended}")
    return Record(job.cell, "ok")


def unpicklable(job: Job, tell: Tell) -> Record:
    """A cell whose record cannot be sent."""
    return Record(job.cell, "ok", log={"what": lambda: None})


class Riddle:
    """What can be sent, and not read at the other end."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def unreadable(job: Job, tell: Tell) -> Record:
    """A cell whose record cannot be read by the runner."""
    return Record(job.cell, "ok", log={"what": Riddle()})


def placed(job: Job, tell: Tell) -> Record:
    """A cell that times something while `beside` cells do so, and says where; one called a victim is killed at it."""
    seen = Path(job.cell.settings["seen"])
    gate = Gate(job.place.gate, tell)
    with gate.shared(), gate.alone():
        if job.cell.recipe.startswith("victim"):
            os.kill(os.getpid(), signal.SIGKILL)
        (seen / job.cell.recipe).touch()
        end = time.monotonic() + 20
        while len(list(seen.iterdir())) < job.cell.settings.get("beside", 1):
            if time.monotonic() > end:
                raise TimeoutError("the others never came")
            time.sleep(0.01)
    where = {"device": job.place.device, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
    return Record(job.cell, "ok", log=where)


def threads(job: Job, tell: Tell) -> Record:
    """A cell that says how many threads its libraries were told to use, and what runs beside it."""
    counts = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return Record(job.cell, "ok", log={"variables": counts, "threads": threading.active_count()})


def with_fake_model(job: Job, tell: Tell) -> Record:
    """The real cell around a model that is not there and probes that say what `settings` tells them to."""
    install_fakes()
    return with_faults(job, tell)


def with_faults(job: Job, tell: Tell) -> Record:
    """The real cell, which knows the methods that misbehave."""
    os.environ["EFFBENCH_METHODS"] = str(HERE / "methods_for_tests")
    from effbench.cells.execute import execute

    return execute(job, tell)


def install_fakes() -> None:
    """Put a model and probes in place of the real ones, in this process."""
    import effbench.probes as probes

    load: Any = types.ModuleType("effbench.nn.files.load")
    load.open_run = lambda source, data, device, dtype, seed, settings: FakeRun(settings)
    sys.modules["effbench.nn.files.load"] = load
    environment: Any = types.ModuleType("effbench.machine.environment")
    environment.describe = lambda device="cpu": {"machine": "fake"}
    sys.modules["effbench.machine.environment"] = environment
    probes.take = take  # type: ignore[assignment]
    probes.EXCLUSIVE = frozenset({"speed"})


def take(name: str, run: FakeRun, settings: dict[str, Any]) -> Any:
    """A reading of one metric called like the probe, or what `settings` has for it instead."""
    from effbench.probes import Reading

    run.taken.append(name)
    found = settings.get("readings", {}).get(name, 1.0)
    if isinstance(found, Exception):
        raise found
    reading = Reading(samples={name: [found]})
    reading.metrics[name] = Metric(found)  # of no definition
    reading.protocols[name] = "fake"
    return reading


class FakeRun:
    """As much of a run as a cell touches."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        if "open" in settings:
            raise settings["open"]
        self.device = torch.device("cpu")
        self.model = torch.nn.Module()
        self.log = RunLog()
        self.waited = 0.0
        self.taken: list[str] = []
        self.closed = False
        self.finished = False
        runs.append(self)

    def apply(self, step: Any) -> None:
        step.apply(self)

    def finish(self, recipe_is_empty: bool = False) -> None:
        self.finished = True

    def close(self) -> None:
        self.closed = True


runs: list[FakeRun] = []
