"""Cells of several ranks, and fits that are killed: one record, no hang, and the same bits from a checkpoint."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from effbench.cells.options import RunOptions
from effbench.cells.plan import plan
from effbench.cli.main import main
from effbench.core.errors import Usage
from effbench.core.recipe import parse

KILLER = Path(__file__).parent.parent / "methods_for_tests" / "faults" / "rank_killed.py"
FIT = str(parse("fit(steps=6, lr=1e-3, batch_size=4, max_length=64)"))


def run(folder: Path, recipe: str, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and records by the steps of their recipes."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(["run", f"recipe={recipe}", f"results={folder}", "device=cpu", "--json", *options])
    return code, {record["cell"]["steps"]: record for record in map(json.loads, out.getvalue().splitlines())}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One rank and two, with what each has written."""
    folder = tmp_path_factory.mktemp("ranks")
    found: dict[str, Any] = {}
    for recipe in (FIT, f"ddp(), {FIT}"):
        code, told = run(folder, recipe, "probes=perplexity,training,cost,foresight", "tier=quick", "data=tiny:task")
        assert code == 0
        found |= told
    return folder, found


def test_a_cell_of_two_ranks_is_one_record(trained: tuple[Path, dict[str, Any]]) -> None:
    _, found = trained
    one, two = found[FIT], found[f"ddp(), {FIT}"]
    assert one["outcome"] == two["outcome"] == "ok"
    a, b = (record["metrics"]["token_ppl"][0] for record in (one, two))
    assert a == pytest.approx(b, rel=1e-4)
    assert one["log"]["fits"][0]["tokens"] == two["log"]["fits"][0]["tokens"]
    assert two["metrics"]["fit_tokens"][0] == two["log"]["fits"][0]["tokens"]


def test_what_one_of_two_ranks_holds_is_foretold_within_its_cell(trained: tuple[Path, dict[str, Any]]) -> None:
    _, found = trained
    for record in (found[FIT], found[f"ddp(), {FIT}"]):
        for part in ("weights", "gradients", "optimizer"):
            assert record["metrics"][f"plan_{part}_off"][0] == 0


def test_a_line_for_every_step_lies_beside_the_record(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = trained
    logs = sorted(folder.glob("records/adhoc/v1/*.fit-1.jsonl"))
    assert len(logs) == 2 and not any((folder / "scratch").iterdir())
    for log in logs:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["step"] for line in lines] == [*range(1, 7)]
        assert all(line["loss"] == pytest.approx(sum(line["terms"].values())) for line in lines)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_cell(tmp_path: Path, engine: str) -> None:
    begin = time.monotonic()
    code, found = run(tmp_path, f"{engine}(), '{KILLER}:RankKilled'(), {FIT}", "probes=cost", "data=tiny:task")
    (record,) = (record for steps, record in found.items() if engine in steps)
    assert record["outcome"] == "crashed" and code == 1
    assert record["reason"].startswith("rank 1: killed by signal 9") and "fit(" in record["reason"]
    assert time.monotonic() - begin < 120


def test_a_failure_on_all_ranks_is_told_once_and_as_it_is(tmp_path: Path) -> None:
    recipe = "ddp(), fit(steps=2, lr=1e18, clip=None, max_length=64)"
    _, found = run(tmp_path, recipe, "probes=cost", "data=tiny:task")
    (record,) = (record for steps, record in found.items() if "ddp" in steps)
    assert record["outcome"] == "diverged", record["reason"]


def test_more_ranks_than_cores_run_alone_and_are_not_timed(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    batch = plan(RunOptions(recipe=f"ddp(ranks={cores + 1}), fit()", results=str(tmp_path), device="cpu"))
    crowded = next(cell.job for cell in batch.cells if cell.job.ranks > 1)
    assert crowded.ranks == cores + 1 and "speed" not in crowded.probes
    other = next(cell.job for cell in batch.cells if cell.job.ranks == 1)
    assert "speed" in other.probes


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of everything in the middle of a fit."""
    recipe = str(parse("fit(steps=20, lr=1e-3, batch_size=8, max_length=64)"))
    monkeypatch.setenv("EFFBENCH_CHECKPOINT_SECONDS", "0")
    options = ("probes=perplexity", "data=tiny:task", "device=cpu")
    _, found = run(tmp_path / "whole", recipe, *options[:2])
    whole = found[recipe]
    command = [sys.executable, "-m", "effbench", "run", f"recipe={recipe}", f"results={tmp_path / 'cut'}", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while (
        not (left := list((tmp_path / "cut").glob("scratch/*/fit-1-*/*/0/state.json"))) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert left, "no checkpoint was written"
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.send_signal(signal.SIGKILL)
    process.wait()
    _, found = run(tmp_path / "cut", recipe, *options[:2])
    again = found[recipe]
    assert again["log"]["fits"][0]["resumed"], "it began anew"
    assert again["metrics"]["token_ppl"] == whole["metrics"]["token_ppl"]
    assert not list((tmp_path / "cut" / "scratch").iterdir())


def test_ranks_that_find_no_gpu_each_are_wrong_usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from effbench.cells import plan as planning
    from effbench.machine.devices import Device
    from effbench.machine.placement import Placement

    gpu = Device("cuda:0", "A GPU", "GPU-1", "0")
    placed = Placement((gpu,), "a-gpu", 1, 1, "quick", 4)
    monkeypatch.setattr(planning, "place", lambda *_: placed)
    with pytest.raises(Usage, match="takes 2 ranks, a GPU each, and there are 1"):
        plan(RunOptions(recipe="ddp(ranks=2), fit()", results=str(tmp_path)))
