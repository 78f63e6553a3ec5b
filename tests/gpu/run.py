"""Everything that needs an NVIDIA GPU, as one command: checks, timings and suites, with all results in one archive.

    python tests/gpu/run.py out=DIR [budget=480] [--dry-run]

It runs from a plain checkout and needs no network. DIR gets `summary.txt` and `results.tar.gz`: records, tables,
timings and logs. A step that fails or outlasts its share of the budget is noted, and the others go on; what a step
leaves of its share is there for those after it. Exit code 1 if anything was not as it should be.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]  # neither is installed

from wheels import closure, installed, project

from effbench import probes
from effbench.core.errors import Usage
from effbench.core.usage import parse

GRACE = 15.0  # seconds that a step has to end after it was interrupted
LEAST = 5.0  # seconds with which it is worth beginning a step
OFFLINE = {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
MACHINE = """
import dataclasses, json, sys, torch
from effbench.machine.ceilings import ceilings
from effbench.machine.environment import describe
device = torch.device(sys.argv[1])
found = {"environment": describe(str(device)), "ceilings": dataclasses.asdict(ceilings(device))}
print(json.dumps(found, indent=1))
"""
ONE = "finetuning*,bf16*,lora*,*_tuning*,student*"  # rows of suite spine that one GPU is enough for
IMPORTS = "from effbench.ops import list_ops, load; print(*[load(name).name for name in list_ops()])"


@dataclasses.dataclass
class Options:
    """What the script can be told."""

    out: str | None = None  # folder for the summary and the archive
    budget: float = 480.0  # seconds for everything


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of this Python; `{results}` and `{seconds}` (four fifths of its limit) are filled in."""

    name: str
    share: float  # of the budget
    command: tuple[str, ...]


def steps() -> list[Step]:
    """What runs on a GPU, in this order."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()  # most of it compiles, on the processor
    run = ("-m", "effbench", "run", "device=cuda", "tier=quick", "results={results}")
    brief = ",".join(name for name in probes.names() if name != "energy")  # which takes windows of five seconds
    return [
        Step("machine", 25, ("-c", MACHINE, "cuda:0")),
        Step("kernels", 70, (*pytest, *parallel, "tests/kernels/test_kernels.py")),
        Step("tests", 50, (*pytest, "--ignore=tests/kernels/test_kernels.py", "tests")),
        Step("bench", 100, ("-m", "effbench", "bench", "device=cuda", "seconds={seconds}", "out={results}/bench")),
        Step("gpu-smoke", 105, (*run, "suite=gpu-smoke")),
        # The embedded model is small: cells share the GPU but for what is timed.
        Step("quant", 115, (*run, "suite=quant", "jobs=6", f"probes={brief}")),
        Step("spine", 60, (*run, "suite=spine", "jobs=6", f"recipes={ONE}", "probes=completion,perplexity,training")),
        Step("report", 10, ("-m", "effbench", "report", "results={results}", "--write")),
    ]


def checks() -> list[Step]:
    """What of that can be checked without a GPU."""
    plan = ("-m", "effbench", "run", "device=cpu", "tier=quick", "--dry-run")
    return [
        Step("ops", 1, ("-c", IMPORTS)),
        Step("tests", 1, ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", "tests")),
        *(Step(suite, 1, (*plan, f"suite={suite}")) for suite in ("gpu-smoke", "quant")),
        Step("spine", 1, (*plan, "suite=spine", f"recipes={ONE}")),
    ]


def missing() -> list[str]:
    """Packages that the project needs, as far as metadata here tells, and that are not installed."""
    return sorted(name for name in closure(project()[""]) if installed(name) is None)


def interruptible() -> None:
    """Have SIGINT end this process: what a shell starts in the background ignores it, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def perform(step: Step, seconds: float, results: Path, log: Path) -> tuple[bool, str]:
    """Run a step for so many seconds at most; whether it went well, and what is to be said of it."""
    environment = os.environ | OFFLINE
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    words = [word.replace("{results}", str(results)) for word in step.command]
    words = [word.replace("{seconds}", f"{0.8 * seconds:.0f}") for word in words]
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=interruptible,
        )
        try:
            process.wait(seconds)
            late = ""
        except subprocess.TimeoutExpired:
            late = f", interrupted after {seconds:.0f} s"
            process.send_signal(signal.SIGINT)  # it keeps what it has
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    took = time.monotonic() - begin
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    fine = process.returncode == 0 and not late
    verdict = "ok" if fine else f"FAILED ({process.returncode}{late})"
    last = lines[-1].strip() if lines else "(silent)"
    return fine, f"{step.name:<10} {verdict}, {took:.0f} s of {seconds:.0f} s: {last}"


def pack(work: Path, out: Path, summary: list[str]) -> None:
    """Write what there is so far; a step that takes the machine down does not take this along."""
    (out / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
    unfinished = out / ".results.tmp"
    with tarfile.open(unfinished, "w:gz") as archive:
        archive.add(out / "summary.txt", "summary.txt")
        archive.add(work, ".")
    unfinished.rename(out / "results.tar.gz")


def carry_out(todo: list[Step], budget: float, out: Path | None) -> bool:
    """Run the steps within `budget` seconds, telling of each; whether all went well."""
    end = time.monotonic() + budget
    summary: list[str] = []
    well = True
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "logs").mkdir()
        for number, step in enumerate(todo):
            left = end - time.monotonic()
            seconds = left * step.share / sum(later.share for later in todo[number:])
            if seconds < LEAST:
                fine, line = False, f"{step.name:<10} SKIPPED, no time is left"
            else:
                fine, line = perform(step, seconds, work / "results", work / "logs" / f"{number}-{step.name}.log")
            well &= fine
            summary.append(line)
            print(line, flush=True)
            if out is not None:
                pack(work, out, summary)
    return well


def main(arguments: list[str]) -> int:
    """Raises `Usage`."""
    dry = "--dry-run" in arguments
    lacking = missing()
    hint = "tests/gpu/wheels.py gathers them where there is a network" if lacking else ""
    if lacking and not dry:
        raise Usage(f"not installed: {', '.join(lacking)}; {hint}")
    options = parse(Options, [argument for argument in arguments if argument != "--dry-run"])
    if not options.budget > 0:
        raise Usage(f"budget={options.budget}: must be above 0")
    if options.out is None:
        raise Usage("give out=DIR, the folder for results")
    out = Path(options.out).expanduser().resolve()
    if (out / "results.tar.gz").exists():
        raise Usage(f"out={options.out}: holds results, which are not overwritten; name another folder")
    if dry:
        total = sum(step.share for step in steps())
        for step in steps():
            words = " ".join(word if "\n" not in word else "..." for word in step.command)
            print(f"{step.name:<10} {options.budget * step.share / total:>4.0f} s  python {words}")
        print(f"not installed: {', '.join(lacking)}; {hint}" if lacking else "nothing is missing")
        return int(not carry_out(checks(), options.budget, None))
    out.mkdir(parents=True, exist_ok=True)
    return int(not carry_out(steps(), options.budget, out))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Usage as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2)
