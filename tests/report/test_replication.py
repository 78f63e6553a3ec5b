"""What a report says of the spread of differences, and of what to measure again."""

import json

import numpy as np
import pytest
from fake_records import make, store_records

from effbench.cli.main import main
from effbench.records.record import Metric
from effbench.report.columns import make_columns
from effbench.report.differences import compute_tests, parse_kept, write_kept
from effbench.report.groups import group_records
from effbench.report.pages import render
from effbench.report.sheets import make_sheets

WINDOWS = 40


def measure(recipe, seed, losses):
    """A record with these losses of windows."""
    value = Metric(float(np.exp(np.mean(losses))), n=WINDOWS)
    return make(recipe, seed, metrics={"token_ppl": value}, samples={"token_ppl_window_nll": list(losses)})


def build(of_seeds, gap, of_items=0.05, seeds=(0, 1, 2)):
    """A baseline, and a row that is `gap` nats worse, seeds `of_seeds` and items `of_items` apart."""
    rng = np.random.default_rng(4)
    base = rng.normal(2.0, 0.3, WINDOWS)
    own = rng.normal(0, of_items, WINDOWS)
    rows = [measure("gptq(bits=4)", seed, base + gap + own + of_seeds * (seed - 1)) for seed in seeds]
    return [measure("baseline", 0, base), *rows]


def read_cells(records):
    (table,) = group_records(records)
    tests = compute_tests(table)
    columns = make_columns(table.measured)["replication"]
    return {column.header: column.show(table.rows[1], tests) for column in columns}


def test_seeds_and_items_are_told_apart():
    noisy, calm = read_cells(build(0.2, 0.1)), read_cells(build(0.0, 0.1))
    assert int(noisy["perplexity: of seeds, %"]) > 95 and int(calm["perplexity: of seeds, %"]) == 0
    assert noisy["perplexity: twice the seeds or items, −%"] == "29, 0"
    assert calm["perplexity: twice the seeds or items, −%"] == "0, 29"
    assert float(noisy["perplexity: seen from"]) > 5 * float(calm["perplexity: seen from"])


def test_what_is_seen_from_one_seed_is_said_and_no_more():
    cells = read_cells(build(0.2, 0.1, seeds=(0,)))
    assert cells["perplexity: of seeds, %"] == "–" and float(cells["perplexity: seen from"]) > 0


@pytest.mark.parametrize(
    "records, advice",
    [
        (build(0.0, 0.006, of_items=0.03), "Replicate first: gptq(bits=4) (perplexity: 120 items). So many"),
        (build(0.0, 1.0), ""),  # settled
        (build(0.0, 0.0, of_items=0.5), ""),  # out of reach
        (build(0.0, 1.0, seeds=(1,)), "Replicate first: other seeds."),
    ],
)
def test_advice(records, advice):
    (sheet,) = make_sheets(group_records(records))
    assert sheet.advice.startswith(advice) and bool(sheet.advice) == bool(advice)
    assert sheet.advice in render(records, "quant", "md").replace("\\", "")
    assert not sheet.advice or sheet.advice not in render(records, "quant", "tex")


def test_the_command(tmp_path, capsys):
    store_records(tmp_path / "results", build(0.2, 0.1))
    assert main(["report", f"results={tmp_path / 'results'}", "detail=replication", "format=md"]) == 0
    assert "| perplexity: of seeds, % |" in capsys.readouterr().out


def test_components_are_kept_with_the_tests():
    tables = group_records(build(0.2, 0.1))
    text = write_kept(tables, {})
    kept = parse_kept(text)
    (row,) = kept.values()
    assert row["token_ppl"].spread.runs == 3 and compute_tests(tables[0], kept) == compute_tests(tables[0])
    assert len(next(iter(json.loads(text)["rows"].values()))["token_ppl"]) == 7
