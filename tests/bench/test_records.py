"""Reading, listing and filtering very many records. `tox -e bench` prints the figures beside their targets."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from effbench.core.paths import PACKAGE
from effbench.records import shared
from effbench.records.record import summarize, write_text
from effbench.records.samples import split_layers
from effbench.records.store import Store

pytestmark = pytest.mark.slow


def fill(results: Path, suites: int, each: int) -> None:
    """Record files like a published one of every suite, without results per item."""
    (record, *_), _ = Store(PACKAGE.parent / "results").read("quant")
    for i in range(suites):
        store = Store(results)
        folder = store.folder(f"suite{i}", 1)
        cell = dataclasses.replace(record.cell, suite=f"suite{i}", suite_version=1)
        summary = summarize(record)
        summary = msgspec.structs.replace(
            summary,
            cell=cell,
            environment=shared.add_environment(store.records, summary.environment),
            protocols=shared.add_protocols(folder, summary.protocols),
            samples={},
            log=split_layers(summary.log)[0],
        )
        for seed in range(each):
            recipe = f"gptq-{seed % 97}b"
            changed = dataclasses.replace(cell, seed=seed, recipe=recipe, steps=f"gptq(bits={seed % 97})")
            text = write_text(msgspec.structs.replace(summary, cell=changed))
            name = dataclasses.replace(record, cell=changed).name
            (folder / name).write_text(text)


def test_one_suite_of_ten_thousand_records(benchmark, tmp_path, capsys):
    fill(tmp_path, 1, 10_000)
    records, notes = benchmark.pedantic(lambda: Store(tmp_path).read(), rounds=1)
    assert (len(records), notes) == (10_000, [])
    with capsys.disabled():
        print(f"\n10,000 records of one suite read: {benchmark.stats['mean']:.1f} s (target under 5 s)")


def test_a_hundred_thousand_records_in_five_hundred_tables(benchmark, tmp_path, capsys):
    fill(tmp_path, 500, 200)
    command = [sys.executable, "-m", "effbench", "list", "records", f"results={tmp_path}", "recipe=gptq-4*"]

    def listed() -> int:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return len(done.stdout.splitlines())

    begin = time.perf_counter()
    first = listed()
    built = time.perf_counter() - begin
    assert benchmark.pedantic(listed, rounds=3) == first > 10_000
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    with capsys.disabled():
        print(
            f"\n100,000 records filtered and listed: {benchmark.stats['mean']:.1f} s (target under 5 s), "
            f"{built:.0f} s the first time, {peak:.2f} GiB (target under 1)"
        )
