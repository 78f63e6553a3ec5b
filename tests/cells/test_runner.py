"""Running cells: whatever happens to one costs that one, and nothing that is done gets lost."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from multiprocessing import util
from pathlib import Path

import fake_cells
import httpx
import psutil
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from effbench.cells import execute as cells
from effbench.cells.job import Place
from effbench.cells.local import Local, last_words
from effbench.cells.run import run_cells
from effbench.core.errors import Diverged, OutOfMemory, Refused, Unavailable, Unsupported, Usage
from effbench.core.recipe import parse
from effbench.records.metric import Metric
from effbench.records.record import FAILED, OUTCOMES, RETRIED, Record
from effbench.records.store import Store, latest

HERE = Path(__file__).parent.parent
LIGHT = ("effbench.cells.local", "torch", "effbench.machine.peak")  # enough for fakes, and quick to load


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
        ("device_oom()", "oom", "device_oom(): tried to allocate 20.00 GiB; 10.50 GiB of 79.11 GiB were free"),
        ("diverge()", "diverged", "the loss is nan"),
        ("full_disk()", "crashed", "no space left on the disk"),
        ("hang()", "timeout", "took more than 5 s, the last of it in hang()"),
    ],
)
def test_a_fault_costs_one_cell(store, make_job, faults, steps, outcome, words):
    jobs = [make_job("before"), make_job("fault", steps), make_job("after")]
    records, _ = run_cells(jobs, store, local("with_fake_model", timeout=5.0 if outcome == "timeout" else 60.0))
    assert outcomes(records) == {"before": "ok", "fault": outcome, "after": "ok"}
    record = latest(store.read()[0])[jobs[1].cell.identity]
    assert words in record.reason
    assert (outcome == "crashed" and "Error" in record.reason) <= ("Traceback" in record.traceback)
    assert record.environment == {"machine": "fake"}  # known before it went wrong
    assert not left_behind()


def test_whatever_a_method_writes_into_its_log_is_kept(store, make_job, faults):
    run_cells([make_job("row", "scribbles()")], store, local("with_fake_model"))
    (record,), notes = store.read()
    assert (record.outcome, notes) == ("ok", [])
    assert {"1": "a", "(2, 3)": None, "mute": "<Mute>"}.items() <= record.log["notes"].items()
    assert record.log["layers"] == {"a": {"7": None}}


def left_behind():
    """Processes that hang() started and that are still there."""
    return [p for p in psutil.process_iter(["cmdline"]) if "import time; time.sleep(1000)" in (p.info["cmdline"] or [])]


def test_a_crash_outside_the_cell_keeps_its_output(store, make_job):
    records, _ = run_cells([make_job("row")], store, local("unluckily"))
    assert records[0].outcome == "crashed"
    assert "not today" in records[0].log["output"]


@pytest.mark.parametrize(
    ("execute", "cause"),
    [
        ("unluckily", "the process ended with exit code 1 while in start: RuntimeError: not today"),
        ("unpicklable", "exit code 1 while in start: AttributeError: Can't pickle local object"),
        ("unreadable", "its record cannot be read: ValueError: invalid literal for int()"),
    ],
)
def test_a_crash_outside_the_cell_names_its_cause(store, make_job, execute, cause):
    records, _ = run_cells([make_job("row"), make_job("after")], store, local(execute))
    assert [record.outcome for record in records] == ["crashed", "crashed"]
    assert all(cause in record.reason for record in records)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("Traceback (most recent call last):\n  File x\nValueError: no\n", "ValueError: no"),
        ("Fatal Python error: Segmentation fault\n\nThread 1\n", "Fatal Python error: Segmentation fault"),
        ("loading\nthe ErrorBar is drawn\n", ""),
        ("torch.AcceleratorError: CUDA error: x\n[W] noise\n", "torch.AcceleratorError: CUDA error: x"),
        ("a.cu:1: kernel: Assertion `i < n` failed.\n", "a.cu:1: kernel: Assertion `i < n` failed."),
        ("", ""),
    ],
)
def test_last_words(output, words):
    assert last_words(output) == words


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


@pytest.mark.parametrize("error", [TypeError("'<' not supported"), RecursionError("deep"), UnicodeError("\ud800")])
def test_whatever_goes_wrong_while_a_record_is_written_costs_its_cell(store, make_job, monkeypatch, error):
    write = Store.write

    def fail(self, record):
        if record.cell.recipe == "r1":
            raise error
        return write(self, record)

    monkeypatch.setattr(Store, "write", fail)
    records, _ = run_cells([make_job(f"r{i}") for i in range(3)], store, local())
    assert outcomes(records) == {"r0": "ok", "r1": "crashed", "r2": "ok"}
    reasons = [record.reason for record in records if record.outcome == "crashed"]
    assert type(error).__name__ in reasons[0]


def test_temporary_folders_removed_in_mid_run(store, make_job, tmp_path, monkeypatch):
    """Outputs, locks and the socket of the fork-server lie there. Cells run on, and new ones can start."""
    socket = Path(util.get_temp_dir())  # made before, for its path has to be short
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # tests that run beside this one have folders of their own
    jobs = [make_job(f"r{i}", seconds=0.3) for i in range(6)]
    ended = 0

    def watch(event):
        nonlocal ended
        ended += event.record is not None
        if event.record is not None and ended in (1, 3):
            folders = [*tmp_path.glob("effbench-*"), socket]
            assert len(folders) > 1
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            jobs[0].place.gate.unlink(missing_ok=True)

    records, interrupted = run_cells(jobs, store, local(), watch)
    assert not interrupted and len(records) == 6
    assert set(outcomes(records).values()) == {"ok"}
    assert jobs[0].place.gate.is_file()


def test_a_cell_that_another_run_has_finished_is_not_measured_again(store, make_job):
    jobs = [make_job(f"r{i}") for i in range(4)]
    theirs = Record(jobs[3].cell, "ok", started="2026-01-01", metrics={"length": Metric(99.0)})
    notes = {}

    def watch(event):
        if event.record is not None:
            if not notes:  # while the first one of ours ends, the other run ends its own
                store.write(theirs)
            notes[event.record.cell.recipe] = event.note

    records, _ = run_cells(jobs, store, local(jobs=1), watch)
    assert notes == {"r0": "", "r1": "", "r2": "", "r3": "measured by another run"}
    assert [r.metrics["length"].value for r in records if r.cell.recipe == "r3"] == [99.0]


def test_a_later_attempt_of_another_run_counts_as_well(store, make_job):
    job = make_job("r0")
    store.write(Record(job.cell, "crashed"))
    store.write(Record(job.cell, "ok", attempt=2, metrics={"length": Metric(99.0)}))
    (record,), _ = run_cells([job], store, local())
    assert record.attempt == 2 and record.metrics["length"].value == 99.0


@pytest.mark.parametrize("times", [{"started": "2026-01-01"}, {"seconds": 0.25}])  # the second may be the same
def test_a_record_that_comes_second_is_dropped_and_this_is_said(store, make_job, times):
    job = make_job("slow", seconds=0.5)
    events = []

    def watch(event):
        if not events:  # ours has started
            store.write(Record(job.cell, "ok", **times, metrics={"length": Metric(99.0)}))
        events.append(event)

    (record,), _ = run_cells([job], store, local(), watch)
    assert record.metrics["length"].value == 99.0 and "kept" in events[-1].note
    assert len(store.read()[0]) == 1


@pytest.mark.parametrize("barred", [False, True])
def test_what_is_reported_is_on_disk_though_the_folder_was_removed(store, make_job, monkeypatch, barred):
    removed = []

    def watch(event):
        if event.record is not None and not removed:
            removed.append(event.record.cell.recipe)
            shutil.rmtree(store.results)
            if barred:
                store.results.write_text("in the way")

    records, _ = run_cells([make_job(f"r{i}") for i in range(3)], store, local(jobs=1), watch)
    if barred:
        assert set(outcomes(records).values()) == {"crashed"}
        assert all("could not be written" in record.reason for record in records)
    else:
        assert set(outcomes(records).values()) == {"ok"} and len(removed) == 1
        assert outcomes(store.read()[0]) == outcomes(records)


def test_a_process_that_cannot_start_costs_its_cell(store, make_job, monkeypatch):
    def fail(self, job, execute, folder):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("effbench.cells.local.Worker.__init__", fail)
    records, _ = run_cells([make_job("row")], store, local())
    assert outcomes(records) == {"row": "crashed"} and "Too many open files" in records[0].reason


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


# ---- several devices ----

IMPORTS = """
import ctypes, importlib, sys, torch
asked = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name, call=getattr(torch.cuda, name): asked.append(name) or call(*_))
from effbench.cells.local import PRELOAD
for name in PRELOAD:
    importlib.import_module(name)
"""
ASKED = "sys.exit(' '.join(asked) or 0)"
STARTED = (
    "sys.exit(0 if ctypes.CDLL('libcuda.so.1').cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 3 else 'started')"
)


@pytest.mark.parametrize("check", [ASKED, pytest.param(STARTED, marks=pytest.mark.gpu)])
def test_imports_of_the_fork_server_leave_cuda_alone(check):
    """A process that has started CUDA cannot be forked: its children could not use a device."""
    done = subprocess.run([sys.executable, "-c", IMPORTS + check], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def gpus(tmp_path):
    """Two places that are to be seen as "4" and as "GPU-6", each with its lock."""

    def place(visible):
        gate = tmp_path / f"{visible}.lock"
        gate.touch()
        return Place("cuda:7", gate, visible)

    return place("4"), place("GPU-6")


@pytest.fixture
def spread(make_job, gpus, tmp_path):
    """Jobs that run on either of two devices and note in one folder when they are timing."""
    seen = tmp_path / "seen"
    seen.mkdir()

    def jobs(*recipes, **settings):
        made = [make_job(recipe, seen=str(seen), **settings) for recipe in recipes]
        return [dataclasses.replace(job, places=gpus) for job in made]

    return jobs


def test_cells_time_at_once_on_their_own_devices(store, spread):
    """Neither would end if the gate of one device kept the other waiting."""
    records, _ = run_cells(spread("a", "b", beside=2), store, local("placed"))
    assert [record.outcome for record in records] == ["ok", "ok"]
    assert {record.log["visible"] for record in records} == {"4", "GPU-6"}
    assert {record.log["device"] for record in records} == {"cuda:0"}, "a process sees its own device alone"
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == SEEN


SEEN = os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_device_has_one_cell_at_a_time(store, spread):
    working: set[Place] = set()
    used: set[Place] = set()

    def watch(event):
        place = event.job.place
        if event.record is not None:
            working.discard(place)
        else:
            assert place not in working
            working.add(place)
            used.add(place)

    records, _ = run_cells(spread(*"abcdefg", seconds=0.2), store, local("quick"), watch)
    assert len(records) == 7 and len(used) == 2


def test_a_device_that_is_being_timed_on_gets_no_cell(store, spread, gpus):
    """Another program holds the first device; its share does not go to the second, which serves all alone."""
    with gpus[0].gate.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        records, _ = run_cells(spread(*"abc"), store, local("placed"))
    assert outcomes(records) == {"a": "ok", "b": "ok", "c": "ok"}
    assert {record.log["visible"] for record in records} == {"GPU-6"}


def test_more_jobs_than_devices_share_them_evenly(store, spread):
    working: Counter[Place] = Counter()
    most: Counter[Place] = Counter()

    def watch(event):
        working[event.job.place] += 1 if event.record is None else -1
        most[event.job.place] = max(most[event.job.place], working[event.job.place])

    run_cells(spread(*"abcdefgh", seconds=0.5), store, local("quick", jobs=4), watch)
    assert list(most.values()) == [2, 2]


def test_a_killed_cell_frees_its_device(store, spread):
    """It dies while it alone may use the device."""
    records, _ = run_cells(spread("victim1", "victim2", "a", "b", beside=2), store, local("placed"))
    assert outcomes(records) == {"victim1": "crashed", "victim2": "crashed", "a": "ok", "b": "ok"}
    assert {record.log["visible"] for record in records if record.outcome == "ok"} == {"4", "GPU-6"}


# ---- interrupted and killed ----

SCRIPT = """
import json, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from effbench.cells.job import Job, Place
from effbench.records.record import Cell, RETRIED, FAILED
from effbench.cells.local import Local, last_words
from effbench.cells.run import run_cells
from effbench.sources import DataSource, Source
from effbench.records.store import Store, latest

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
        jobs.append(Job(cell, Source("tiny", "tiny"), DataSource("tiny", "tiny"), (Place("cpu", gate),), attempt))
executor = Local(2, 60.0, execute="fake_cells:quick", preload=["effbench.cells.local"])
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


@pytest.mark.slow
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

    for module in ("effbench.nn.files.load", "effbench.machine.environment"):
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


def test_a_reason_names_no_folder_of_the_machine(fake, make_job, tmp_path, monkeypatch):
    """But the file of a method, as the user does from the working folder, or with its own folder."""
    file = tmp_path / "home" / "mine" / "fails.py"
    file.parent.mkdir(parents=True)
    file.write_text(FAILS)
    steps = f"'{file}:Fails'(bits=4)"
    for folder, name in ((file.parent.parent, "./mine/fails.py:Fails"), ("/usr", "mine/fails.py:Fails")):
        monkeypatch.chdir(folder)
        record = fake(make_job("row", steps=steps))
        assert record.reason == f"{name}(bits=4): {name}(bits=4): cannot be"
        assert str(tmp_path) not in json.dumps([record.reason, record.log])


FAILS = """
from dataclasses import dataclass
from effbench.core.errors import Unsupported
from effbench.core.method import Method

@dataclass(frozen=True)
class Fails(Method):
    bits: int = 8

    def apply(self, run):
        raise Unsupported(f"{self}: cannot be")
"""


def hub(message: str, cause: BaseException) -> BaseException:
    """As models and tokenizers of the Hub fail to load."""
    error = Unsupported(message)
    error.__cause__ = cause
    return error


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
        (FloatingPointError(" \n"), "diverged", "a number is not finite"),
        (ModuleNotFoundError(), "unavailable", "ModuleNotFoundError"),
        (ValueError(), "crashed", "ValueError"),
        (Usage("rope is already set"), "refused", "rope"),
        (OSError(errno.ENOSPC, "No space left on device"), "crashed", "OSError: no space left on the disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "crashed", "OSError: no space left on the disk"),
        (hub("cannot be read", OSError(errno.ENOSPC, "No space left")), "crashed", "no space left on the disk"),
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


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub"),
        hub("config.json cannot be read", httpx.ConnectError("Name or service not known")),
        hub("config.json cannot be read", LocalEntryNotFoundError("not in the cache")),
        hub("gated", GatedRepoError("401", response=httpx.Response(401, request=httpx.Request("GET", "https://x")))),
        DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
        ModuleNotFoundError("No module named 'sacrebleu'"),
        Unavailable("no token"),
    ],
)
def test_what_could_not_be_had_is_tried_again(fake, make_job, error):
    """The network, access, a package: nothing that a method or model is to blame for."""
    record = fake(make_job("row", open=error))
    assert (record.outcome, record.traceback) == ("unavailable", "")
    assert record.outcome in RETRIED and record.outcome in FAILED and record.outcome in OUTCOMES
    record = fake(
        make_job("row", readings={"quality": error, "memory": Unsupported("no")}, probes=["memory", "quality"])
    )
    assert record.outcome == "unavailable"


def test_a_local_file_that_is_not_there_is_no_matter_of_the_network(fake, make_job):
    error = hub("config.json cannot be read", OSError("no file named model.safetensors"))
    assert fake(make_job("row", open=error)).outcome == "unsupported"


def test_torch_s_own_out_of_memory(fake, make_job):
    import torch

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    record = fake(make_job("row", open=error))
    assert (record.outcome, record.reason) == ("oom", f"open: {error}")


def test_a_lack_of_memory_names_its_phase_and_what_was_wanting(fake, make_job, faults):
    record = fake(make_job("row", "device_oom()", probes=["memory"]))
    wanting = {"asked_bytes": 20 * 2**30, "free_bytes": round(10.5 * 2**30), "total_bytes": round(79.11 * 2**30)}
    assert record.log["shortfall"] == {"phase": "device_oom()", **wanting}
    readings = {"memory": OutOfMemory("no room", asked_bytes=3), "speed": MemoryError()}
    record = fake(make_job("row", probes=list(readings), readings=readings))
    assert record.log["shortfall"] == {"phase": "memory", "asked_bytes": 3}
    assert "shortfall" not in fake(make_job("row")).log


def test_a_full_device_is_found_before_anything_is_opened(fake, make_job, monkeypatch):
    error = OutOfMemory("cuda:0 is full", asked_bytes=5, free_bytes=1, total_bytes=9)

    def full(device):
        raise error

    monkeypatch.setattr("effbench.machine.devices.check_room", full)
    record = fake(make_job("row"))
    assert (record.outcome, record.reason) == ("oom", "open: cuda:0 is full")
    assert fake_cells.runs == []


@pytest.fixture
def cuda(make_job, monkeypatch):
    """Jobs on a GPU that is not there, and what its driver says when asked whether all is well (None: it is)."""
    import torch

    state: dict[str, str | None] = {"error": None}

    def synchronize(device):
        if state["error"]:
            raise RuntimeError(f"{state['error']}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 80 * 2**30))
    monkeypatch.setattr("effbench.machine.devices.check_room", lambda device: None)

    def make(recipe, steps="", **settings):
        job = make_job(recipe, steps, **settings)
        return job.at([Place("cuda:0", job.place.gate)])

    return state, make


ASSERTED = "CUDA error: device-side assert triggered"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"{ASSERTED}\nmore"), f"quality: RuntimeError: {ASSERTED}: after this"),
        (Unsupported("no head"), f"quality: no head; {ASSERTED}: after this"),
    ],
)
def test_after_a_spoiled_context_nothing_more_is_tried(fake, cuda, error, reason):
    state, make = cuda
    state["error"] = ASSERTED
    record = fake(make("row", probes=["memory", "quality", "perplexity", "speed"], readings={"quality": error}))
    assert record.outcome == "crashed" and record.reason.startswith(reason)
    assert fake_cells.runs[0].taken == ["memory", "quality"] and fake_cells.runs[0].closed
    assert set(record.metrics) == {"memory"}


def test_other_failures_leave_a_device_at_work(fake, cuda):
    _, make = cuda
    record = fake(make("row", probes=["quality", "memory", "speed"], readings={"quality": KeyError("a")}))
    assert set(record.metrics) == {"memory", "speed"}


@pytest.mark.parametrize(
    ("message", "outcome"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously", "oom"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "oom"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "oom"),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`", "oom"),
        ("CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseCreate(handle)`", "oom"),
        ("Triton Error [CUDA]: out of memory", "oom"),
        ("out of resource: shared memory, Required: 300000, Hardware limit: 232448.", "crashed"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", "crashed"),
        ("CUDA error: no kernel image is available for execution on the device", "crashed"),
    ],
)
def test_what_cuda_and_its_libraries_say(fake, cuda, message, outcome):
    _, make = cuda
    record = fake(make("row", probes=["memory"], readings={"memory": RuntimeError(message)}))
    assert record.outcome == outcome
    assert message.splitlines()[0] in record.reason
    if outcome == "oom":
        assert record.reason.endswith("; 3.00 GiB of 80.00 GiB were free")
        assert record.log["shortfall"] == {"phase": "memory", "free_bytes": 3 * 2**30, "total_bytes": 80 * 2**30}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("steps", "outcome", "words"),
    [("device_oom()", "oom", "tried to allocate"), ("spoiled()", "crashed", "device-side assert triggered")],
)
def test_faults_of_a_real_device_cost_one_cell(store, make_job, tmp_path, steps, outcome, words):
    from effbench import sources
    from effbench.machine import devices

    places = tuple(Place(gpu.name, tmp_path / "gate.lock", gpu.visible) for gpu in devices.visible()[:1])
    jobs = [
        dataclasses.replace(
            make_job(recipe, text, probes=["memory", "flops"]),
            places=places,
            source=sources.model("tiny"),
            data=sources.data(None),
        )
        for recipe, text in (("before", ""), ("fault", steps), ("after", ""))
    ]
    records, _ = run_cells(jobs, store, local("with_faults", jobs=1, timeout=300.0))
    assert outcomes(records) == {"before": "ok", "fault": outcome, "after": "ok"}
    assert words in records[1].reason
    if outcome == "oom":
        shortfall = records[1].log["shortfall"]
        assert shortfall["asked_bytes"] > shortfall["total_bytes"] > shortfall["free_bytes"] > 0


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
    assert cells.facts(parse(""), 128) == {}
    assert cells.facts(parse("rtn(bits=4)"), 128) == {
        "type": "PTQ",
        "calibration_data": "none",
        "weight_update": "none",
        "caveats": [f"rtn: {caveat}" for caveat in parse("rtn()").steps[0].caveats],
    }
    found = cells.facts(parse("rtn(bits=8), gptq(bits=4)"), 128)
    assert found["calibration_data"] == "none, 128 sequences"
    found = cells.facts(parse("layer_pruning(), head_pruning(), neuron_pruning(score='magnitude'), fit()"), 2)
    assert found["calibration_data"] == "2 sequences, 2 sequences with gradients, none"
    assert found["type"] == "post-training, fine-tuning"
    assert cells.facts(parse("wanda(), lora(), fit()"), 8) == {
        "type": "post-training, PEFT, fine-tuning",
        "calibration_data": "8 sequences",
        "weight_update": "none, low rank",
        "multi_task": "swap",
        "composition": "stack",
        "merge": "yes",
        "caveats": [f"lora: {caveat}" for caveat in parse("lora()").steps[0].caveats],
    }


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("fit()", {}),
        ("galore(), fit()", {}),
        ("dora(), fit()", {"multi_task": "swap", "composition": "stack", "merge": "yes"}),
        ("prefix_tuning(), fit()", {"multi_task": "swap", "composition": "stack"}),
        ("intrinsic_dimension(), fit()", {"merge": "yes"}),
    ],
)
def test_what_becomes_of_what_was_trained(recipe, told):
    found = cells.facts(parse(recipe), None)
    assert {name: found[name] for name in ("multi_task", "composition", "merge") if name in found} == told


@pytest.mark.parametrize(
    ("recipe", "update"),
    [
        ("fit()", "training"),
        ("movement(), fit()", "training"),
        ("lottery_ticket()", "training"),
        ("wanda(), fit()", "none, training"),
        ("learned_mask(), fit()", "none"),
        ("lora(), fit()", "low rank"),
        ("lora(), fit(), gmp(), fit()", "low rank, training"),
    ],
)
def test_what_a_fit_does_to_weights_is_told(recipe, update):
    assert cells.facts(parse(recipe), 128)["weight_update"] == update


def test_caveats_name_the_method_as_recipes_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = "from effbench.core.kinds import Weights\nfrom dataclasses import dataclass\n\n"
    body = "@dataclass(frozen=True)\nclass Mine(Weights):\n    caveats = ('half of it',)\n"
    (tmp_path / "mine.py").write_text(f'"""Mine."""\n{base}{body}    def compress(self, layer): ...\n')
    assert cells.facts(parse("./mine.py:Mine()"), 128)["caveats"] == ["./mine.py:Mine: half of it"]
    steps = "./mine.py:Mine(), learned_mask(), fit()"
    assert {caveat.partition(": ")[0] for caveat in cells.facts(parse(steps), 1)["caveats"]} >= {"learned_mask"}


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
