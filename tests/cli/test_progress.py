"""What a person sees while cells run: how far a method has come, and how long it will still take."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_records import make

from effbench.cells import findings, plan
from effbench.cells.local import Event
from effbench.cells.options import RunOptions
from effbench.checks import toy_run
from effbench.cli import progress, remaining
from effbench.cli.progress import Lines, Live
from effbench.cli.remaining import Remaining
from effbench.core.recipe import parse
from effbench.records.store import Store


@pytest.fixture
def clock(monkeypatch: Any) -> Any:
    """Seconds that pass when a test says so."""
    now = SimpleNamespace(seconds=1000.0)
    for module in (remaining, progress, findings):
        monkeypatch.setattr(module.time, "monotonic", lambda: now.seconds)
    return now


def event(name: str, phase: str = "", far: Any = None, seconds: float | None = None, outcome: str = "ok") -> Event:
    """News of a cell; its record if it took `seconds`."""
    record = make(name, steps=f"rtn(bits={len(name)})", outcome=outcome)
    job: Any = SimpleNamespace(cell=record.cell)
    ended = None if seconds is None else dataclasses.replace(record, seconds=seconds)
    return Event(job, phase, far, ended)


A, BB, CCC = (event(name) for name in ("a", "bb", "ccc"))


def expecting(at_a_time: int = 1, **seconds: float) -> Remaining:
    events = {"a": A, "bb": BB, "ccc": CCC}
    expected = {events[name].job.cell.identity: value for name, value in seconds.items()}
    return Remaining([one.job for one in (A, BB, CCC)], expected, at_a_time)


def test_before_the_first_cell_ends_earlier_records_say_it(clock: Any) -> None:
    known = expecting(a=10, bb=20, ccc=30)
    assert known.seconds() == 60
    known.watch(event("a", "open"))
    clock.seconds += 4
    assert known.seconds() == 56
    assert expecting(at_a_time=2, a=10, bb=20, ccc=30).seconds() == 30
    assert expecting(a=10, bb=20).seconds() == 45  # a row that nobody has measured is like the others


def test_cells_that_ended_give_the_pace(clock: Any) -> None:
    known = expecting(a=10, bb=20, ccc=30)
    known.watch(event("a", seconds=30))
    assert known.seconds() == 150
    known.watch(event("bb", seconds=1, outcome="unsupported"))  # which says nothing of others
    assert known.seconds() == 90
    known.watch(event("ccc", seconds=90))
    assert known.seconds() is None


def test_without_earlier_records_blocks_say_it(clock: Any) -> None:
    known = expecting()
    assert known.seconds() is None
    known.watch(event("a", "open"))
    clock.seconds += 6
    known.watch(event("a", "gptq()"))
    assert known.seconds() is None
    clock.seconds += 10
    known.watch(event("a", "gptq()", ("block", 1, 5)))
    assert known.seconds() == 40 + 2 * 56
    clock.seconds += 10
    known.watch(event("a", "gptq()", ("block", 2, 5)))
    assert known.seconds() == 30 + 2 * 56


def test_plain_lines_say_it_sparsely(clock: Any) -> None:
    out = io.StringIO()
    lines = Lines(expecting(a=100, bb=20, ccc=30), 3, out)
    with lines:
        for block in range(1, 14):
            lines.watch(event("a", "gptq()", ("block", block, 30)))
            clock.seconds += 11
        lines.watch(event("a", seconds=132))
    first, one, two, ended = out.getvalue().splitlines()
    assert first.endswith("; about 2.5 min left")
    assert one == "a seed 0: gptq(): block 7 of 30; about 84.0 s left"
    assert two.startswith("a seed 0: gptq(): block 13 of 30; about ")
    assert ended.startswith("[1/3] a seed 0: ok")


def test_a_terminal_shows_how_far_each_cell_is(clock: Any) -> None:
    from rich.console import Console

    out = io.StringIO()
    live = Live(expecting(a=100, bb=20, ccc=30), 3, out)
    live.watch(event("a", "gptq()", ("block", 7, 30)))
    console = Console(file=out, width=100)
    console.print(live._render())
    assert "gptq(): block 7 of 30" in out.getvalue() and "about 2.5 min left" in out.getvalue()


@pytest.mark.parametrize("steps", ["gptq(group_size=32)", "wanda()", "rtn(group_size=32)", "squeezellm()"])
def test_methods_on_weights_tell_their_blocks(steps: str) -> None:
    run, told = toy_run(), []
    run.progress = lambda *news: told.append(news)
    run.apply(parse(steps).steps[0])
    assert told == [("block", 1, 2), ("block", 2, 2)]


def test_a_fit_tells_its_steps() -> None:
    run, told = toy_run(), []
    run.progress = lambda *news: told.append(news)
    run.apply(parse("fit(steps=3, max_length=16, batch_size=2)").steps[0])
    assert told == [("training step", step, 3) for step in (1, 2, 3)]


def test_progress_is_told_once_in_a_while(clock: Any) -> None:
    told: list[Any] = []
    found = findings.Findings(lambda **news: told.append(news), "cpu")
    for block in range(1, 9):
        clock.seconds += 0.4
        found.progress("block", block, 8)
    assert [news["progress"] for news in told] == [("block", 3, 8), ("block", 6, 8)]


def test_what_rows_took_is_read_from_own_and_published_records(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan, "PUBLISHED", tmp_path / "published")
    options = RunOptions(suite="quant", recipes="rtn-4b,nf4", tier="quick", device="cpu", results=str(tmp_path / "own"))
    cells = [planned.job.cell for planned in plan.plan(options).cells]
    for folder, rows in (("published", cells), ("own", cells[:1])):
        for cell in rows:
            other = dataclasses.replace(cell, digests={"open": folder})
            seconds = {"published": 7.0, "own": 3.0}[folder]
            Store(tmp_path / folder).write(dataclasses.replace(make("x"), cell=other, seconds=seconds))
    expected = plan.expect_seconds(plan.plan(options))
    assert [expected[cell.identity] for cell in cells] == [3.0, 7.0, 7.0]
