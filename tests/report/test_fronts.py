"""Fronts over the rows of a table: which metrics, which noise, which rows have no place, and how it is shown."""

import dataclasses
import math
import re

import numpy as np
import pytest
from fake_records import RECORDS, failed, make, store_records

from effbench.cli.main import main
from effbench.records.record import Metric
from effbench.report.fronts import FEWEST, LEGEND, Fronts, make_front_columns
from effbench.report.groups import group_records
from effbench.report.noise import OTHER_ITEMS, Noise

BYTES, PPL, SPEED = "stored_bytes", "token_ppl", "decode_speedup_b1_c128"


def find(records, x=BYTES, y=PPL):
    (table,) = group_records(records)
    front = Fronts(table).find(x, y)
    return {point.row.recipe: point for point in front.points}, front


def timed(record, ratios):
    """The record with rounds of decoding in which the model took so much of the reference's time."""
    samples = {"decode_seconds_b1_c128": [1 / ratio for ratio in ratios]}
    samples["decode_reference_seconds_b1_c128"] = [1.0] * len(ratios)
    value = Metric(float(np.median(ratios)), n=len(ratios))
    return dataclasses.replace(
        record, samples=record.samples | samples, metrics=record.metrics | {"decode_speedup_b1_c128": value}
    )


def test_rows_are_judged_by_paired_items():
    """All rows are as uncertain as the windows differ, and yet a row that is worse on all of them is excluded."""
    found, front = find(RECORDS)
    assert found["gptq(bits=4)"].membership.status == "robust"
    assert found["rtn(bits=2)"].membership.status == "robust"  # the smallest
    low, high = found["baseline"].y.low, found["baseline"].y.high
    assert low < found["gptq(bits=4)"].y.value < high  # their own intervals overlap
    worse = make("nf4()", worse=0.05, bits=4.5, rng_seed=9)
    found, _ = find([*RECORDS, worse])
    assert found["nf4()"].membership.excluded
    assert next(point.row.recipe for point in front.drawn) == "rtn(bits=2)"


def test_a_row_that_may_be_better_is_open():
    """Larger and a hair worse: dominated as the numbers stand, but not beyond chance."""
    found, _ = find([*RECORDS, make("nf4()", worse=0.0215, bits=4.5, rng_seed=9)])
    member = found["nf4()"].membership
    assert not member.drawn and member.status == "open" and 0 < member.probability < 0.9
    assert re.fullmatch(r"\d+ % open", str(found["nf4()"]))


def test_seeds_add_to_the_doubt():
    apart = [make("a()", seed, worse=0.02 + 0.03 * seed, bits=5) for seed in range(3)]
    alike = [make("a()", seed, worse=0.05, bits=5) for seed in range(3)]
    other = make("b()", worse=0.03, bits=4.0)
    assert find([make(), other, *alike])[0]["a()"].membership.excluded
    assert not find([make(), other, *apart])[0]["a()"].membership.excluded


def test_rounds_of_timing_are_the_noise_of_speeds():
    steady = [1.01, 1.0, 1.02, 1.0, 1.01, 1.0, 1.01]
    noisy = [0.7, 1.0, 1.5, 0.8, 1.3, 1.01, 1.2]
    slower = [ratio * 0.97 for ratio in noisy]
    rows = [timed(make(), steady), timed(make("a()", worse=0.1), [r * 0.9 for r in steady])]
    assert find([*rows, timed(make("b()", worse=0.1), noisy)], SPEED)[0]["a()"].membership.excluded
    found, front = find([*rows, timed(make("b()", worse=0.1), slower)], SPEED)
    assert found["b()"].membership.status == "open" and front.once == ()


def test_two_rounds_exclude_little():
    rows = [timed(make(), [1.0, 1.02]), timed(make("a()", worse=0.1), [0.99, 0.95])]
    rows.append(timed(make("b()", worse=0.1), [0.05, 0.0501]))
    found, _ = find(rows, SPEED)
    assert not found["a()"].membership.excluded


def test_what_was_measured_once_says_so():
    """Its samples are the steps of the recipe, which are no sample of anything."""
    records = [
        dataclasses.replace(r, samples={**r.samples, "apply_seconds": [1.0] * len(r.cell.recipe)}) for r in RECORDS
    ]
    found, front = find(records, "apply_seconds")
    assert len(found) == 4
    assert front.once == ("apply_seconds",)
    assert find(RECORDS)[1].once == ()  # bytes are exact
    assert ("nothing is applied") in {reason for _, reason in front.absent}


def test_rows_without_a_place_say_why():
    odd = make("other()", worse=0.1, bits=3)
    odd = dataclasses.replace(odd, protocols=odd.protocols | {PPL: "another protocol"})
    short = make("short()", worse=0.1, bits=3)
    short.samples["token_ppl_window_nll"] = short.samples["token_ppl_window_nll"][:7]
    wild = [make(f"wild{value}()", metrics={PPL: Metric(value), BYTES: Metric(1.0)}) for value in (math.inf, math.nan)]
    found, front = find([*RECORDS, odd, short, *wild, failed("x()", outcome="crashed")])
    reasons = {row.recipe: reason for row, reason in front.absent}
    assert reasons["wildinf()"] == reasons["wildnan()"] == "infinite or not a number"
    assert reasons["other()"] == reasons["short()"] == OTHER_ITEMS
    assert reasons["x()"] == "crashed" and reasons["squeezellm(bits=3)"] == "oom"
    assert not {*reasons} & {*found}


def test_an_interval_is_taken_where_there_are_no_items():
    bare = [dataclasses.replace(record, samples={}) for record in RECORDS]
    (table,) = group_records(bare)
    drawn = Noise(table.rows).draw(PPL)
    baseline = table.rows[0].records[0].metrics[PPL]
    assert np.exp(np.quantile(drawn.draws[:, 0], [0.025, 0.975])) == pytest.approx([baseline.low, baseline.high], 0.02)


def test_metrics_of_the_same_items_are_drawn_together():
    """A row that is good on the windows that are drawn has a low perplexity and a low KL at once."""
    records = [make(), *(make(f"a(n={n})", worse=0.1 * n) for n in (1, 2))]
    for record in records:
        record.samples["kl_nats_per_token"] = [0.1 * value for value in record.samples["token_ppl_window_nll"]]
    (table,) = group_records(records)
    noise = Noise(table.rows)
    assert noise.draw(PPL).draws[:, 1] - noise.draw(PPL).values[1] == pytest.approx(
        10 * (noise.draw("kl_nats_per_token").draws[:, 1] - noise.draw("kl_nats_per_token").values[1]), abs=1e-9
    )
    again = Noise(table.rows[:2]).draw(PPL).draws
    assert (again == noise.draw(PPL).draws[:, :2]).all()  # whatever other rows there are


def test_axes_are_what_rows_differ_in():
    (table,) = group_records(RECORDS)
    fronts = Fronts(table)
    assert fronts.qualities[0] == PPL and fronts.costs == [BYTES]  # all else is equal in these records
    (few,) = group_records(RECORDS[:1] + RECORDS[4:5])
    assert make_front_columns(few) == [] and len(few.rows) < FEWEST


def test_every_format_shows_who_cannot_be_excluded(tmp_path, capsys):
    folder = store_records(tmp_path / "results", [*RECORDS, make("nf4()", worse=0.0215, bits=4.5, rng_seed=9)]).results
    for style, mark in (("md", "● "), ("tex", r"$\bullet$ "), ("rich", "● ")):
        assert main(["report", f"results={folder}", f"format={style}", "detail=front"]) == 0
        text = capsys.readouterr().out
        assert re.search(rf"gptq\S*.*{re.escape(mark)}\d+ \\?% robust", text)
        assert re.search(r"nf4\S*.* \d+ \\?% open", text)
    assert main(["report", "--glossary"]) == 0
    assert LEGEND in capsys.readouterr().out
