"""Running jobs: each in a process of its own, which costs one cell whatever happens to it.

Processes come from a fork-server that has imported what cells need and never computes anything (a process
that has computed with threads cannot be forked safely), so a cell starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import importlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

from effbench.cells.execute import facts
from effbench.cells.job import Job, Place
from effbench.core.recipe import parse
from effbench.machine.gate import idle
from effbench.records.record import OutcomeName, Record

EXECUTE = "effbench.cells.execute:execute"  # what a cell does; tests name other functions


# Leaves, because the packages themselves import lazily and every cell would pay for it.
PRELOAD = (
    "effbench.cells.local",
    "effbench.nn.files.load",
    "effbench.probes.quality",
    "effbench.machine.environment",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "datasets",
    "pandas",
)


QUIET = "ignore:resource_tracker:UserWarning"


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # ask the runner to end


THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


TICK = 0.2  # seconds between looks at clocks and at whether to stop


GRACE = 5.0  # seconds for a process to end once its record is here
DYING = 2.0  # seconds, fewer than these, for a process that was killed to be gone


TAIL = 4000  # bytes of a failed cell's output that are kept


LINE = 300  # characters of it that are part of the reason


ERROR = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt)(:|$)|terminate called|.*Assertion .*failed")


@dataclasses.dataclass(frozen=True)
class Event:
    """News of a job: the phase it entered, how far it has come in there, or its record."""

    job: Job
    phase: str = ""
    progress: tuple[str, int, int] | None = None  # unit, done, of how many
    record: Record | None = None
    note: str = ""  # where the record comes from, if not from this run


class Local:
    """Jobs on this machine, at most `jobs` at a time, each for at most `timeout` seconds of its own time.

    They are spread over the places that they name, so that none has two while another has none.
    """

    def __init__(
        self,
        jobs: int,
        timeout: float,
        threads: int = 1,
        execute: str = EXECUTE,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        self.jobs = jobs
        self.timeout = timeout
        self.threads = threads
        self.execute = execute
        self.preload = list(preload)

    def run(
        self, jobs: Sequence[Job], stop: threading.Event, find: Callable[[Job], Record | None] = lambda _: None
    ) -> Iterator[Event]:
        """Run the jobs in order and give news of them. Once `stop` is set, running ones are killed.

        A job of which `find` knows a record by the time of its start is not run.
        """
        waiting, running = deque(jobs), list[Worker]()
        if not waiting:
            return
        with tempfile.TemporaryDirectory(prefix="effbench-", ignore_cleanup_errors=True) as folder:
            try:
                while (waiting or running) and not stop.is_set():
                    while waiting and (places := self._find_places(waiting[0], running)):
                        job = waiting.popleft().at(places)
                        if record := find(job):
                            yield Event(job, record=record, note="measured by another run")
                            continue
                        try:
                            running.append(self._start(job, Path(folder)))
                        except (OSError, EOFError) as error:
                            yield Event(job, record=_lost(job, "crashed", f"its process could not start: {error}"))
                    connection.wait([source for worker in running for source in worker.sources], TICK)
                    for worker in running:
                        yield from worker.news(self.timeout)
                    running = [worker for worker in running if not worker.ended]
            finally:
                for worker in running:
                    worker.kill()

    def _find_places(self, job: Job, running: Sequence[Worker]) -> list[Place]:
        """Places for the ranks of another job now: idle, and the emptiest that have not their share yet; else none.

        A job of more ranks than may run at a time runs alone, and its ranks share the one place that there is.
        """
        taken = Counter(place for worker in running for place in worker.job.places)
        if taken.total() + job.ranks > self.jobs and running:
            return []
        share = -(-max(self.jobs, job.ranks) // len(job.places))
        vacant = [place for place in job.places if idle(place.gate) for _ in range(share - taken[place])]
        chosen = sorted(vacant, key=taken.__getitem__)[: job.ranks]
        return chosen if len(chosen) == job.ranks else []

    def _start(self, job: Job, folder: Path, tries: int = 10) -> Worker:
        start_server(self.preload, self.threads)  # again, should it have died
        try:
            return Worker(job, self.execute, folder)
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            if tries == 1:
                raise
            if isinstance(error, FileNotFoundError):  # its socket was removed; else it is dying at this moment
                abandon_server()
        time.sleep(TICK)
        return self._start(job, folder, tries - 1)


class Worker:
    """A process at work on one job, seen from outside."""

    def __init__(self, job: Job, execute: str, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self.job = job
        self.ended = False
        self._output = folder / f"{job.cell.identity}.txt"
        folder.mkdir(parents=True, exist_ok=True)  # again, should somebody have removed it
        self._output.touch()
        self._news: dict[str, Any] = {}
        self._date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._started = time.monotonic()
        self._waited = 0.0
        self._waiting_since: float | None = None
        self._connection, child = context.Pipe(duplex=False)
        self._folder = tempfile.mkdtemp(dir=folder)  # where ranks find each other
        self._processes = [
            context.Process(
                target=_work, args=(child, execute, job, self._output, rank, f"{self._folder}/store"), daemon=False
            )
            for rank in range(job.ranks)
        ]
        for process in self._processes:
            process.start()
        child.close()

    @property
    def sources(self) -> list[Any]:
        """What becomes readable when there is news."""
        sentinels = [process.sentinel for process in self._processes]
        return sentinels if self._connection.closed else [self._connection, *sentinels]

    def news(self, timeout: float) -> Iterator[Event]:
        """What happened since the last call; ends with the record."""
        dead = self._find_dead()  # before reading: all that a dead worker sent can then be read
        if dead is not None:
            code = self._processes[dead].exitcode
            self.kill()
        yield from self._messages()
        if self.ended:
            return
        if dead is not None:
            who = f"rank {dead}: " if len(self._processes) > 1 else ""
            reason = f"{who}{_exit_reason(code)} while in {self._news.get('phase', 'start')}"
            cause = last_words(self._read_output()) if code else ""
            yield self._lose("crashed", f"{reason}: {cause}" if cause else reason)
        elif self.seconds > timeout:
            self.kill()
            reason = f"took more than {timeout:g} s, the last of it in {self._news.get('phase', 'start')}"
            yield self._lose("timeout", reason)

    @property
    def seconds(self) -> float:
        """Time the job has had, waiting for the device not counted."""
        now = time.monotonic()
        waiting = now - self._waiting_since if self._waiting_since is not None else 0.0
        return now - self._started - self._waited - waiting

    def _find_dead(self) -> int | None:
        """The rank whose end ends the job; others than the first end well once they have trained."""
        ended = [rank for rank, process in enumerate(self._processes) if not process.is_alive()]
        return next((rank for rank in ended if not rank or self._processes[rank].exitcode), None)

    def kill(self) -> None:
        """End the processes and their children, if any is left."""
        for process in self._processes:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self._processes:
            process.join()

    def _messages(self) -> Iterator[Event]:
        while not self.ended and not self._connection.closed and self._connection.poll():
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                self._connection.close()
                return
            except Exception as error:  # of values that cannot be unpickled here
                yield self._lose("crashed", f"its record cannot be read: {type(error).__name__}: {error}")
                return
            if isinstance(message, Record):
                yield self._end(self._blame(message))
            else:
                yield from self._note(message)

    def _blame(self, record: Record) -> Record:
        """The record of a crash with its reason: a rank that was killed, which the first one only misses."""
        others = self._processes[1:]
        if record.outcome != "crashed" or not others:
            return record
        # One that is killed is missed before the system has cleared it away. One that fails alike ends later than this.
        if alive := [process.sentinel for process in others if process.is_alive()]:
            connection.wait(alive, DYING)
        codes = [process.exitcode or 0 for process in self._processes]
        killed = next((rank for rank, code in enumerate(codes) if code < 0), None)
        if not killed:
            return record
        return dataclasses.replace(record, reason=f"rank {killed}: {_exit_reason(codes[killed])}; {record.reason}")

    def _note(self, message: dict[str, Any]) -> Iterator[Event]:
        waiting = message.pop("waiting", None)
        now = time.monotonic()
        if waiting:
            self._waiting_since = now
        elif waiting is False and self._waiting_since is not None:
            self._waited += now - self._waiting_since
            self._waiting_since = None
        self._news |= message
        if "phase" in message:
            yield Event(self.job, message["phase"])
        elif "progress" in message:
            yield Event(self.job, self._news.get("phase", ""), message["progress"])

    def _lose(self, outcome: OutcomeName, reason: str) -> Event:
        """End with the record of a job whose process gave none."""
        record = _lost(self.job, outcome, reason, self._news.get("environment"))
        return self._end(dataclasses.replace(record, started=self._date, seconds=round(self.seconds, 3)))

    def _end(self, record: Record) -> Event:
        self.ended = True
        self._connection.close()
        self._processes[0].join(GRACE)
        self.kill()
        if record.outcome in ("crashed", "timeout"):
            record = dataclasses.replace(record, log=record.log | {"output": self._read_output()})
        return Event(self.job, record=record)

    def _read_output(self) -> str:
        """The end of what the process wrote; empty if the file is gone."""
        with contextlib.suppress(OSError), self._output.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return file.read().decode(errors="replace").strip()
        return ""


def _lost(job: Job, outcome: OutcomeName, reason: str, environment: dict[str, Any] | None = None) -> Record:
    """The record of a job that could give none itself."""
    return Record(
        cell=job.cell,
        outcome=outcome,
        reason=reason,
        attempt=job.attempt,
        facts=facts(parse(job.cell.steps), job.cell.settings.get("calibration_sequences")),
        environment=environment or {},
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def last_words(output: str) -> str:
    """What a process wrote last of what went wrong: the last line that names an error, or the first of a fatal one."""
    lines = [line.strip() for line in output.splitlines()]
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    errors = [line for line in lines if ERROR.match(line)]
    return (fatal or errors[-1:] or [""])[0][:LINE]


def start_server(preload: Sequence[str], threads: int) -> None:
    """Start the fork-server, unless it runs. Its libraries see the thread count before they are loaded."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
    variables["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # an import that asks for CUDA must not start it: forks could not
    # A killed worker leaves semaphores behind. They are removed later; the warning about it would only confuse.
    variables["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), QUIET]))
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    Path(util.get_temp_dir()).mkdir(mode=0o700, parents=True, exist_ok=True)  # of its socket; somebody may remove it
    resource_tracker.ensure_running()  # by itself first: starting it unblocks signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # a signal to the whole group is for the runner alone
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def abandon_server() -> None:
    """Forget a fork-server that cannot be reached any more; it ends with its last worker."""
    server: Any = forkserver._forkserver
    with server._lock:
        if server._forkserver_pid is not None:
            os.close(server._forkserver_alive_fd)
        server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None


def _exit_reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"the process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else "unknown"
    hint = "; the system does this when memory runs out" if -code == signal.SIGKILL else ""
    return f"killed by signal {-code} ({name}{hint})"


def _work(news: connection.Connection, execute: str, job: Job, output: Path, rank: int, meeting: str) -> None:
    """What a worker process does; `meeting` is a file that ranks find each other by."""
    os.setsid()  # a group of its own: killed together with its children, untouched by Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    job = job.entered(rank)
    gc.freeze()  # what the fork-server imported stays: no use in looking through it again and again
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if job.ranks > 1:
        _meet(job, meeting)

    def tell(**message: Any) -> None:
        if not rank:  # the first one speaks for all
            news.send(message)

    module, _, name = execute.partition(":")
    record: Record = getattr(importlib.import_module(module), name)(job, tell)
    if not rank:
        news.send(record)
    elif record.outcome != "ok":
        # The first rank has most likely failed alike and says so; if it waits for this one instead, this one's end
        # is what ends the job.
        print(record.traceback or record.reason, file=sys.stderr, flush=True)
        time.sleep(GRACE)
        os._exit(1)


def _meet(job: Job, meeting: str) -> None:
    """Have the ranks of a job know each other."""
    from torch import distributed

    backend = "nccl" if job.place.device.startswith("cuda") else "gloo"
    store = distributed.FileStore(meeting, job.ranks)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=job.rank, world_size=job.ranks)


def _follow_parent() -> None:
    """A worker whose runner was killed ends too, and opens the gate for others."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
