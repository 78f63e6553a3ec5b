"""Probes that do not see what a row changes are left out of it, and say so where nothing else is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from effbench import probes
from effbench.cells import execute as cells
from effbench.cells.options import RunOptions
from effbench.cells.plan import choose_probes, plan
from effbench.core.recipe import parse
from effbench.records.metric import Metric
from effbench.records.record import Record
from effbench.report.groups import group_records

ASKED = ("perplexity", "quality", "speed")


@pytest.mark.parametrize(
    ("steps", "taken"),
    [
        ("", ASKED),
        ("rtn(bits=3)", ASKED),
        ("h2o(keep=0.5)", ASKED),
        ("sliding_window(window=64)", ASKED),
        ("retrieval(keep=0.5)", ("quality",)),
        ("rtn(bits=3), random_tokens(keep=0.5), h2o(keep=0.5)", ("quality",)),
        ("rtn(bits=3), speculative()", ("quality",)),
    ],
)
def test_a_row_is_measured_by_what_sees_all_that_it_changes(steps: str, taken: tuple[str, ...]) -> None:
    assert choose_probes(ASKED, parse(steps), crowded=False) == taken
    assert choose_probes(ASKED, parse(steps), crowded=True) == tuple(name for name in taken if name != "speed")


def test_probes_that_see_nothing_are_kept_where_nothing_else_is_asked() -> None:
    blind = ("distance", "perplexity", "speed")
    assert choose_probes(blind, parse("retrieval(keep=0.5)"), crowded=False) == blind


@pytest.mark.parametrize("name", probes.names())
def test_every_probe_sees_weights_and_says_what_else(name: str) -> None:
    assert {"weights"} <= probes.sees(name) <= {"weights", "cache", "attention", "prompt", "decoder"}


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    return RunOptions(suite="inference", device="cpu", results=str(tmp_path / "runs"))


def jobs(options: RunOptions, **changes: Any) -> dict[str, Any]:
    """Planned jobs of rows, by recipe."""
    return {job.cell.recipe: job for job in plan(options, changes).todo}


def test_a_cell_of_blind_probes_alone_is_refused(options: RunOptions) -> None:
    """And names each of them; the cell of a method that they see is not."""
    job = jobs(dataclasses.replace(options, recipes="retrieval-keep-0.5"), probes=["distance", "perplexity"])[
        "retrieval-keep-0.5"
    ]
    record = cells.execute(job, lambda **_: None)
    assert record.outcome == "refused" and not record.metrics
    for name in ("distance", "perplexity"):
        assert f"{name} does not see what the recipe changes: prompt" in record.reason


def test_a_cell_without_its_blind_probes_is_ok(options: RunOptions) -> None:
    asked = {"probes": ["perplexity", "quality"], "limit": 4, "tasks": ["tiny_needle_256"]}
    job = jobs(dataclasses.replace(options, recipes="retrieval-keep-0.5"), **asked)["retrieval-keep-0.5"]
    record = cells.execute(job, lambda **_: None)
    assert record.outcome == "ok", record.reason
    assert "tasks_acc" in record.metrics and "token_ppl" not in record.metrics


def test_rows_with_unlike_probes_share_a_table(options: RunOptions) -> None:
    """What was asked of them is the same; what a row has no number of is a gap."""
    planned = jobs(options)
    assert len({job.probes for job in planned.values()}) > 2
    metrics = {"tasks_acc": Metric(0.5, n=40)}
    records = [
        Record(job.cell, "ok", metrics=metrics | ({"token_ppl": Metric(9.0)} if "perplexity" in job.probes else {}))
        for job in planned.values()
    ]
    (table,) = group_records(records)
    assert {row.recipe for row in table.rows} == planned.keys()
    shown = {row.recipe: row.estimate("token_ppl") for row in table.rows}
    assert shown["baseline"] is not None and shown["retrieval-keep-0.5"] is None and shown["rtn-3b-speculative"] is None
