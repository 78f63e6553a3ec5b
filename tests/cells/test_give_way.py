"""A cell at work lets those pass who wait to have the machine to themselves, and counts no time that it waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from effbench.cells import execute as cells
from effbench.cells.job import Job
from effbench.machine.gate import Gate

LONG = 0.5  # seconds that another has the machine to itself


@pytest.mark.parametrize(
    ("phase", "recipe", "changes"),
    [
        ("fit", "fit(steps=6, max_length=16)", {}),
        pytest.param(
            "point 1 of 2",
            "fit(steps=4, max_length=16)",
            {"tune": ["fit(steps=4, max_length=16)", "fit(steps=5, max_length=16)"]},
            marks=pytest.mark.slow,
        ),
        pytest.param("gptq", "gptq(bits=4)", {"calibration_sequences": 8}, marks=pytest.mark.slow),
        ("quality", "rtn(bits=4)", {"probes": ["quality"], "tasks": ["tiny_facts"], "limit": 100}),
    ],
)
def test_others_pass_while_a_cell_works(
    plan_job: Callable[..., Job], phase: str, recipe: str, changes: dict[str, Any]
) -> None:
    job = plan_job(recipe, **changes)
    asked, passed = threading.Event(), list[float]()

    def pass_by() -> None:
        gate = Gate(job.place.gate, lambda **news: None)
        asked.wait(60)
        with gate.shared(), gate.alone():
            time.sleep(LONG)
            passed.append(time.monotonic())

    other = threading.Thread(target=pass_by, daemon=True)
    other.start()

    def tell(**news: Any) -> None:
        if str(news.get("phase", "")).startswith(phase) or phase in str(news.get("progress", "")):
            asked.set()

    begin = time.monotonic()
    record = cells.execute(job, tell)
    end = time.monotonic()
    other.join(5)
    assert record.outcome == "ok", record.reason
    assert passed and passed[0] < end, "the other waited until the cell had ended"
    waited = record.log["phases"]["wait"]
    assert waited > 0.8 * LONG and record.seconds < end - begin - 0.8 * LONG
    assert sum(step["seconds"] for step in record.log["steps"]) < end - begin - 0.8 * LONG
    own = sum(seconds for name, seconds in record.log["phases"].items() if name != "wait")
    assert own < end - begin - 0.8 * LONG
