"""What reports cost on many records. `tox -e bench` prints the figures; targets are printed beside them."""

from __future__ import annotations

import dataclasses
import functools
import math
import resource

import numpy as np
import pytest

from effbench.records.publication import publish_records
from effbench.records.record import Cell, Metric, Record
from effbench.records.store import Store
from effbench.report.groups import group_records
from effbench.report.pages import check, render, write
from effbench.report.published import judge_table, summarise

pytestmark = pytest.mark.slow

WINDOWS, QUESTIONS, TASKS = 64, 100, 7
OTHER = 25  # metrics of memory, speed and cost, which have no tests


@functools.cache
def difficulty():
    """How hard each window and question is, for all rows."""
    rng = np.random.default_rng(0)
    return rng.normal(1.7, 0.3, WINDOWS), rng.random((TASKS, QUESTIONS))


def synthetic(suite: str, row: int, seed: int) -> Record:
    """A record of the size of a real one; some rows are nearly the baseline, most are worse."""
    rng = np.random.default_rng([row, seed])
    worse = 0.0 if row == 0 else 0.2 * rng.random() ** 3
    windows, questions = difficulty()
    nll = windows + worse + rng.normal(0, 0.01, WINDOWS) * (row > 0)
    right = (questions > 0.2 + worse + rng.normal(0, 0.02, questions.shape) * (row > 0)).astype(int)
    shares = right.mean(axis=1)
    metrics = {f"task_{i}_acc": Metric(float(share), 0.0, 1.0, QUESTIONS) for i, share in enumerate(shares)}
    metrics |= {"tasks_acc": Metric(float(shares.mean()), 0.0, 1.0, TASKS * QUESTIONS)}
    metrics |= {"token_ppl": Metric(math.exp(nll.mean()), 1.0, 9.0, WINDOWS)}
    metrics |= {f"decode_speedup_b{i}_c128": Metric(float(rng.random()), 0.1, 0.9, 6) for i in range(OTHER)}
    samples = {f"task_{i}_acc": answers.tolist() for i, answers in enumerate(right)}
    steps = "" if row == 0 else f"rtn(bits={row})"
    cell = Cell(
        suite, 1, "full", steps or "baseline", steps, (), "tiny", "tiny", seed, {"threads": 1, "dtype": "float32"},
        {"model": "m", "data": "d", "tasks": "t", "open": "o", f"method.{row}": "x"},
    )  # fmt: skip
    return Record(
        cell, "ok", metrics=metrics, samples=samples | {"token_ppl_window_nll": nll.tolist()},
        protocols=dict.fromkeys(metrics, "as always"), environment={"machine": "m", "host": "h", "commit": "c" * 40},
        started=f"2026-01-01T{row % 24:02}:00:00+00:00",
    )  # fmt: skip


def of_suite(suite: str, rows: int, seeds: int) -> list[Record]:
    return [synthetic(suite, row, seed) for row in range(rows) for seed in range(seeds)]


def tell(capsys, benchmark, what: str, target: str) -> None:
    with capsys.disabled():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\n{what}: {benchmark.stats['mean']:.2f} s (target {target}); peak of this process {peak:.2f} GiB")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """16 suites of 80 rows with three seeds, with their tables and kept tests."""
    results = tmp_path_factory.mktemp("published")
    for number in range(16):
        publish_records(of_suite(f"suite{number}", 80, 3), results, "full")
    write(results)
    return results


def test_check_of_sixteen_suites(benchmark, published, capsys):
    benchmark.pedantic(lambda: check(published), rounds=1)
    assert check(published) == []
    tell(capsys, benchmark, "report --check, 16 suites of 240 records", "under 5 s")


@pytest.mark.parametrize("style", ["md", "csv", "tex", "rich"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_one_table_of_ten_thousand_records(benchmark, capsys, style, seeds):
    """From records in memory: sorting, tests and text."""
    records = of_suite("many", 10_000 // seeds, seeds)
    benchmark.pedantic(lambda: render(records, "many", style), rounds=1)
    tell(capsys, benchmark, f"one table of 10,000 records with {seeds} seeds as {style}, read already", "under 10 s")


def test_one_table_of_ten_thousand_records_from_disk(benchmark, tmp_path, capsys):
    from effbench.report.pages import load

    for record in of_suite("many", 10_000, 1):
        Store(tmp_path).write(record)
    benchmark.pedantic(lambda: render(load(tmp_path, "many"), "many"), rounds=1)
    tell(capsys, benchmark, "one table of 10,000 records from files", "under 10 s")


def test_comparison_with_what_is_published(benchmark, capsys):
    """1,000 own rows that differ a little from as many published ones."""
    records = of_suite("many", 1000, 1)
    own = [dataclasses.replace(record, started="2027-01-01") for record in records]
    (table,), theirs = group_records(own), group_records(records)
    text = benchmark.pedantic(lambda: summarise(table, judge_table(table, theirs)), rounds=1)
    assert "1000 of 1000 rows reproduce" in text
    tell(capsys, benchmark, "1,000 own rows beside the published ones", "under 5 s")
