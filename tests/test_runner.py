"""Running cells: whatever happens to one costs that one, and nothing that is done gets lost."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_cells
import psutil
import pytest

from effbench import cell as cells
from effbench.core.errors import Diverged, OutOfMemory, Refused, Unsupported, Usage
from effbench.core.record import RETRIED, Record
from effbench.executors import Local, gate_file
from effbench.runner import run_cells
from effbench.store import Store, latest

HERE = Path(__file__).parent
LIGHT = ("effbench.executors", "torch", "effbench.probes.peak")  # enough for fakes, and quick to load


def local(execute="quick", jobs=2, timeout=60.0):
    return Local(jobs, timeout, execute=f"fake_cells:{execute}", preload=LIGHT)


def outcomes(records):
    return {record.cell.recipe: record.outcome for record in records}


# ---- one process per cell ----


def test_records_are_written_as_cells_end(store, make_job):
    jobs = [make_job(f"r{i}") for i in range(5)]
    seen = []

    def watch(event):
        if event.record is not None:
            seen.append(len(store.read()[0]))

    records, interrupted = run_cells(jobs, store, local(), watch)
    assert not interrupted
    assert seen == [1, 2, 3, 4, 5]
    assert {record.cell.identity for record in records} == {job.cell.identity for job in jobs}


def test_at_most_jobs_at_once(store, make_job):
    jobs = [make_job(f"r{i}", seconds=0.3) for i in range(4)]
    working: set[str] = set()
    most = 0

    def watch(event):
        nonlocal most
        if event.record is not None:
            working.discard(event.job.cell.recipe)
        else:
            working.add(event.job.cell.recipe)
        most = max(most, len(working))

    run_cells(jobs, store, local(jobs=3), watch)
    assert most == 3


@pytest.mark.parametrize(
    ("steps", "outcome", "words"),
    [
        ("crash()", "crashed", "crash(): ValueError: a bug"),
        ("exits()", "crashed", "SystemExit: 3"),
        ("vanishes()", "crashed", "exit code 3 while in vanishes()"),
        ("killed()", "crashed", "killed by signal 9"),
        ("oom()", "oom", "oom(): tried to allocate 2.00 GiB"),
        ("diverge()", "diverged", "the loss is nan"),
        ("full_disk()", "crashed", "no space left on the disk"),
        ("hang()", "timeout", "took more than 3 s, the last of it in hang()"),
    ],
)
def test_a_fault_costs_one_cell(store, make_job, faults, steps, outcome, words):
    jobs = [make_job("before"), make_job("fault", steps), make_job("after")]
    records, _ = run_cells(jobs, store, local("with_fake_model", timeout=3.0))
    assert outcomes(records) == {"before": "ok", "fault": outcome, "after": "ok"}
    record = latest(store.read()[0])[jobs[1].cell.identity]
    assert words in record.reason
    assert (outcome == "crashed" and "Error" in record.reason) <= ("Traceback" in record.traceback)
    assert record.environment == {"machine": "fake"}  # known before it went wrong
    assert not left_behind()


def left_behind():
    """Processes that hang() started and that are still there."""
    return [p for p in psutil.process_iter(["cmdline"]) if "import time; time.sleep(1000)" in (p.info["cmdline"] or [])]


def test_a_crash_outside_the_cell_keeps_its_output(store, make_job):
    records, _ = run_cells([make_job("row")], store, local("unluckily"))
    assert records[0].outcome == "crashed"
    assert "not today" in records[0].log["output"]


def test_the_output_of_workers_does_not_reach_ours(store, make_job, capfd):
    run_cells([make_job("row")], store, local("chatty"))
    assert capfd.readouterr() == ("", "")


def test_killed_workers_cost_their_cells(store, make_job):
    """kill -9 from outside, of each worker that reports."""
    jobs = [make_job(f"r{i}", seconds=0.3) for i in range(6)]
    victims = {"r1", "r4"}

    def watch(event):
        if event.record is None and event.job.cell.recipe in victims:
            newest = max(workers(), key=psutil.Process.create_time)
            newest.kill()

    records, _ = run_cells(jobs, store, local(jobs=1), watch)
    assert {name for name, outcome in outcomes(records).items() if outcome == "crashed"} == victims
    assert all("signal 9 (SIGKILL" in r.reason and "in work" in r.reason for r in records if r.outcome != "ok")


def workers():
    """Processes at work on cells: children of the fork-server, which is a child of this one."""
    return [
        grandchild
        for child in psutil.Process().children()
        for grandchild in child.children()
        if "forkserver" in " ".join(child.cmdline())
    ]


def test_the_fork_server_may_die_too(store, make_job):
    """What runs then may be lost, the rest goes on from a new one."""
    jobs = [make_job(f"r{i}", seconds=0.3) for i in range(6)]

    def watch(event):
        if event.record is None and event.job.cell.recipe == "r2":
            psutil.Process(workers()[0].ppid()).kill()

    records, _ = run_cells(jobs, store, local(), watch)
    assert len(records) == 6
    assert sum(record.outcome != "ok" for record in records) <= 2


def test_threads_are_pinned(store, make_job):
    record = run_cells([make_job("row")], store, local("threads"))[0][0]
    assert record.log["variables"] == {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] == BEFORE


BEFORE = os.environ.get("OMP_NUM_THREADS")


def test_a_record_that_cannot_be_written_runs_again(store, make_job, monkeypatch):
    write = Store.write

    def full(self, record):
        if record.cell.recipe == "r1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, record)

    monkeypatch.setattr(Store, "write", full)
    records, _ = run_cells([make_job(f"r{i}") for i in range(3)], store, local())
    assert outcomes(records) == {"r0": "ok", "r1": "crashed", "r2": "ok"}
    assert "could not be written: No space left" in records[[r.outcome for r in records].index("crashed")].reason
    assert len(store.read()[0]) == 2


# ---- the speed gate ----


def test_a_timing_cell_is_alone(store, make_job, tmp_path):
    jobs = [make_job(f"r{i}", seen=str(tmp_path)) for i in range(6)]
    run_cells(jobs, store, local("timing", jobs=4))
    times = [tuple(map(float, (tmp_path / job.cell.recipe).read_text().split())) for job in jobs]
    for i, (_, _, alone, ended) in enumerate(times):
        for j, (begin, worked, other_alone, other_ended) in enumerate(times):
            if i != j:
                assert worked <= alone or ended <= begin, "another cell worked while this one timed"
                assert other_ended <= alone or ended <= other_alone, "two cells timed at once"


def test_waiting_does_not_count_against_the_timeout(store, make_job, tmp_path):
    """Eight cells that time for 0.2 s each wait for one another longer than the timeout."""
    jobs = [make_job(f"r{i}", seen=str(tmp_path)) for i in range(8)]
    records, _ = run_cells(jobs, store, local("timing", jobs=8, timeout=1.2))
    assert set(outcomes(records).values()) == {"ok"}


def test_two_programs_share_the_gate(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert gate_file("cpu") == gate_file("cpu") == tmp_path / "effbench-cpu.lock"
    assert gate_file("cuda:1").name == "effbench-cuda-1.lock"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert gate_file("cuda:1").name == "effbench-cuda-6.lock"  # what it is called outside


# ---- interrupted and killed ----

SCRIPT = """
import json, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from effbench.cell import Job
from effbench.core.record import Cell, RETRIED, FAILED
from effbench.executors import Local
from effbench.runner import run_cells
from effbench.sources import DataSource, Source
from effbench.store import Store, latest

folder, count = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(exist_ok=True)
gate = folder / "gate"
gate.touch()
store = Store(folder)
before = latest(store.read()[0])
jobs = []
for i in range(count):
    settings, digests = {{"seconds": float(sys.argv[3])}}, {{"row": str(i)}}
    cell = Cell("fakes", 1, "quick", f"row{{i}}", "", (), "tiny", "tiny", 0, settings, digests)
    old = before.get(cell.identity)
    if old is None or old.outcome in RETRIED:
        attempt = old.attempt + 1 if old else 1
        jobs.append(Job(cell, Source("tiny", "tiny"), DataSource("tiny", "tiny"), "cpu", gate, attempt))
executor = Local(2, 60.0, execute="fake_cells:quick", preload=["effbench.executors"])
print("ready", len(jobs), flush=True)
records, interrupted = run_cells(jobs, store, executor, lambda event: print("event", flush=True))
print(json.dumps([r.cell.recipe for r in records]))
sys.exit(130 if interrupted else int(any(r.outcome in FAILED for r in records)))
"""


def start(folder, count, seconds=0.15):
    script = SCRIPT.format(here=str(HERE))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(count), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a shell gives it
    )


def family(process):
    """A runner's processes: its fork-server and the workers."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def ok_cells(folder):
    """Recipes of ok records, doubles included."""
    records, notes = Store(folder).read()
    assert notes == []
    return sorted(record.cell.recipe for record in records if record.outcome == "ok")


def test_killed_ten_times(tmp_path):
    """Runners and workers die at random moments; what follows ends with what an undisturbed run has."""
    rng = random.Random(7)
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    count = 24
    assert start(undisturbed, count).wait(60) == 0

    ghosts: list[psutil.Process] = []
    for kill in range(10):
        runner = start(disturbed, count)
        runner.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.9))
        ghosts += family(runner)
        if kill % 2:
            for process in rng.sample(family(runner), k=min(2, len(family(runner)))):  # fork-server included
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(rng.uniform(0.0, 0.3))
        ghosts += family(runner)
        runner.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        runner.communicate(timeout=30)
    while (last := start(disturbed, count)).wait(60) != 0:
        assert last.returncode == 1  # a killed worker's cell is tried again

    assert ok_cells(disturbed) == ok_cells(undisturbed) == sorted(f"row{i}" for i in range(count))
    assert not psutil.wait_procs(ghosts, timeout=5)[1], "workers of killed runners go on"


def test_workers_of_a_killed_runner_end(tmp_path):
    """Else they would go on for hours, and keep others from timing."""
    runner = start(tmp_path, 2, seconds=1000)
    for _ in range(3):  # ready, and both at work
        runner.stdout.readline()
    processes = family(runner)
    assert len(processes) >= 3
    runner.kill()
    runner.wait(10)
    assert not psutil.wait_procs(processes, timeout=10)[1]


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["process", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_keeps_what_is_done(tmp_path, number, send):
    runner = start(tmp_path, 40)
    for _ in range(7):  # ready, and some events
        runner.stdout.readline()
    processes = family(runner)
    send(runner.pid, number)
    out, err = runner.communicate(timeout=20)
    assert runner.returncode == 130
    assert {record.outcome for record in Store(tmp_path).read()[0]} == {"ok"}, "what was interrupted is no crash"
    assert "Traceback" not in err
    kept = json.loads(out.splitlines()[-1])
    assert kept and sorted(kept) == ok_cells(tmp_path)
    assert not psutil.wait_procs(processes, timeout=5)[1]

    again = start(tmp_path, 40)
    assert again.stdout.readline() == f"ready {40 - len(kept)}\n"
    assert again.communicate(timeout=60) and again.returncode == 0
    assert ok_cells(tmp_path) == sorted(f"row{i}" for i in range(40))


def test_two_runs_into_one_folder(tmp_path):
    runs = [start(tmp_path, 16) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert ok_cells(tmp_path) == sorted(f"row{i}" for i in range(16))


# ---- what becomes of a cell ----


@pytest.fixture
def fake(monkeypatch):
    """The real `execute` in this process, around a fake model."""
    import effbench.probes as probes

    for module in ("effbench.nn.load", "effbench.probes.environment"):
        monkeypatch.setitem(sys.modules, module, None)  # restored afterwards
    monkeypatch.setattr(probes, "take", None)
    monkeypatch.setattr(probes, "EXCLUSIVE", None)
    fake_cells.install_fakes()
    fake_cells.runs.clear()
    return cells.execute


def test_every_probe_is_taken(fake, make_job):
    record = fake(make_job("row", probes=["speed", "quality", "memory"]))
    assert record.outcome == "ok"
    assert set(record.metrics) == {"speed", "quality", "memory"}
    (run,) = fake_cells.runs
    assert run.taken == ["quality", "memory", "speed"]  # those that need the device alone come last
    assert run.finished and run.closed


def test_a_refused_probe_keeps_the_other_readings(fake, make_job):
    readings = {"quality": Refused("random weights"), "perplexity": Refused("random weights")}
    record = fake(make_job("row", probes=["quality", "perplexity", "memory", "speed"], readings=readings))
    assert record.outcome == "refused"
    assert record.reason == "quality, perplexity: random weights"
    assert set(record.metrics) == {"memory", "speed"}
    assert record.traceback == ""


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (Refused("no"), "refused", "no"),
        (Unsupported("no"), "unsupported", "no"),
        (Diverged("nan"), "diverged", "nan"),
        (OutOfMemory("no room"), "oom", "no room"),
        (MemoryError(), "oom", "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you"),
            "oom",
            "can't",
        ),
        (FloatingPointError("nan in loss"), "diverged", "nan in loss"),
        (Usage("rope is already set"), "refused", "rope"),
        (OSError(errno.ENOSPC, "No space left on device"), "crashed", "OSError: no space left on the disk"),
        (KeyError("weight"), "crashed", "KeyError: 'weight'"),
    ],
)
def test_exceptions_become_outcomes(fake, make_job, error, outcome, reason):
    for where in ({"open": error}, {"readings": {"memory": error}, "probes": ["memory", "flops"]}):
        record = fake(make_job("row", **where))
        assert record.outcome == outcome
        assert reason in record.reason
        assert bool(record.traceback) == (outcome == "crashed")
        assert record.reason.startswith("open: " if "open" in where else "memory: ")
        assert set(record.metrics) == (set() if "open" in where else {"flops"})


def test_torch_s_own_out_of_memory(fake, make_job):
    import torch

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    record = fake(make_job("row", open=error))
    assert (record.outcome, record.reason) == ("oom", f"open: {error}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_diverged(fake, make_job, value):
    record = fake(make_job("row", probes=["perplexity", "memory"], readings={"perplexity": value}))
    assert record.outcome == "diverged"
    assert "perplexity is not finite" in record.reason
    assert set(record.metrics) == {"memory"}


def test_the_worst_failure_names_the_outcome(fake, make_job):
    readings = {"quality": Refused("a"), "memory": KeyError("b"), "flops": Unsupported("c")}
    record = fake(make_job("row", probes=list(readings), readings=readings))
    assert record.outcome == "crashed"
    assert record.reason == "quality: a; memory: KeyError: 'b'; flops: c"


def test_a_failed_step_takes_no_probe(fake, make_job, faults):
    record = fake(make_job("row", "diverge()", probes=["memory"]))
    assert record.outcome == "diverged"
    assert record.metrics == {}
    (run,) = fake_cells.runs
    assert not run.finished and run.closed


def test_steps_and_phases_are_timed(fake, make_job):
    told = []
    record = fake(make_job("row", probes=["memory"]), lambda **news: told.append(news))
    assert [news["phase"] for news in told if "phase" in news] == ["wait", "open", "finish", "memory"]
    assert set(record.log["phases"]) == {"wait", "open", "finish", "memory"}
    assert record.started.endswith("+00:00")


def test_facts_of_the_methods():
    from effbench.core.recipe import parse

    settings = {"calibration_sequences": 128}
    assert cells.facts(parse(""), settings) == {}
    assert cells.facts(parse("rtn(bits=4)"), settings) == {
        "type": "PTQ",
        "calibration_data": "none",
        "weight_update": "none",
    }
    found = cells.facts(parse("rtn(bits=8), gptq(bits=4)"), settings)
    assert found["calibration_data"] == "none, 128 sequences"


def test_records_of_attempts(store, make_job):
    """A cell that failed is tried again; the last attempt is the one that is reported."""
    job = make_job("row")
    run_cells([job], store, local("unluckily"))
    assert latest(store.read()[0])[job.cell.identity].outcome in RETRIED
    run_cells([dataclasses.replace(job, attempt=2)], store, local("unluckily"))
    record: Record = latest(store.read()[0])[job.cell.identity]
    assert (record.outcome, record.attempt) == ("ok", 2)
    assert len(store.read()[0]) == 2


def test_a_stop_before_the_start(store, make_job):
    stop = threading.Event()
    stop.set()
    assert list(local().run([make_job("row")], stop)) == []
