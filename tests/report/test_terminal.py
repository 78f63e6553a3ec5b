"""Tables for a terminal: nothing is cut, whatever the width."""

import functools
import re

import pytest
from fake_records import RECORDS, failed, make

from effbench.core.paths import PUBLISHED
from effbench.report.columns import DETAILS
from effbench.report.groups import group_records
from effbench.report.pages import load, render
from effbench.report.sheets import Grid, make_sheets
from effbench.report.styles import terminal

NUMBERS = re.compile(r"\d[\d.]*(?:e-?\d+)?")
published = pytest.mark.skipif(PUBLISHED is None or not PUBLISHED.is_dir(), reason="nothing published here")


@functools.cache
def make_published_sheets(suite):
    return make_sheets(group_records(load(PUBLISHED, suite)))


@published
@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("suite", ["quant", "prune", "adhoc"])
@pytest.mark.parametrize("detail", [name for name in DETAILS if name not in ("published", "chosen")])
def test_names_and_numbers_are_never_cut(suite, width, detail):
    sheets = make_published_sheets(suite)
    text = terminal.page(sheets, width, detail)
    assert "…" not in text
    for sheet in sheets:
        for grid in (grid for grid in sheet.grids if grid.detail == detail):
            shown, omitted = terminal.fit(grid, width)
            assert "\n".join(shown) in text
            assert max(map(len, shown)) <= max(width, *(len(row[0]) for row in grid.rows))
            for row in grid.rows:
                assert any(line.startswith(row[0]) for line in shown), row[0]
            whole = {number for row in grid.rows for cell in row for number in NUMBERS.findall(cell)}
            for line in shown[1:]:
                assert set(NUMBERS.findall(line)) <= whole
            assert not omitted or f"Left out at this width: {omitted[0].split()[0].rstrip(',')}" in text
            assert detail != "summary" or len(grid.header) <= 8
    assert any(line.startswith(f"More: effbench report suite={suite} ") for line in text.splitlines())


def grid(*rows):
    return Grid("summary", ("recipe", "ppl", "tasks", "speed"), rows)


WIDE = grid(
    ("baseline", "5.45 ±0.42", "77.7 ±2.4", "1.00 ±0.01"), ("rtn(bits=2)", "15.95 ±1.38 ↑", "62.0 [55–70]ˢ ↓", "0.65")
)


@pytest.mark.parametrize(
    ("width", "omitted", "last"),
    [
        (60, [], "rtn(bits=2)  15.95 ±1.38 ↑  62.0 [55–70]ˢ ↓        0.65"),
        (40, ["intervals"], "rtn(bits=2)  15.95 ↑  62.0 ↓   0.65"),
        (30, ["intervals", "speed"], "rtn(bits=2)  15.95 ↑  62.0 ↓"),
        (22, ["intervals", "tasks", "speed"], "rtn(bits=2)  15.95 ↑"),
        (15, ["intervals", "speed"], "15.95 ↑  62.0 ↓"),  # the name stands in the line above
    ],
)
def test_intervals_go_first_then_columns_from_the_right(width, omitted, last):
    lines, left_out = terminal.fit(WIDE, width)
    assert left_out == omitted and lines[-1] == last
    assert any(line.startswith("rtn(bits=2)") for line in lines)


def test_a_name_wider_than_the_terminal_is_whole():
    name = "sparsegpt(pattern='2:4', bits=4), lora(rank=16), fit(steps=100, lr=0.001)"
    text = terminal.page(make_sheets(group_records([make(), make(name, worse=0.1)])), 60)
    assert name in text.splitlines()


def test_footnotes_and_the_way_to_the_rest():
    text = " ".join(render([*RECORDS, failed("rtn(bits=1)", reason="x" * 200)], "quant", "rich").split())
    assert f"¹ oom: {'x' * 200}" in text
    details = "quality, front, speed, memory, replication, methods"
    assert text.endswith(f" detail=NAME, of {details}; or format=md for all of it")


def test_a_detail_that_nobody_measured_says_so():
    text = terminal.page(make_sheets(group_records(RECORDS)), 80, "compute")
    assert "Nothing was measured of detail=compute (Operations and energy); there is\ndetail=summary, " in text


def test_colour_only_where_it_is_wanted():
    sheets = make_sheets(group_records(RECORDS))
    plain, coloured = terminal.page(sheets, 80), terminal.page(sheets, 80, colour=True)
    assert "\x1b" not in plain and re.sub(r"\x1b\[\dm", "", coloured) == plain
