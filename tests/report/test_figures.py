"""Plots of fronts: the same bytes for the same numbers, names as text, and nothing written over."""

import dataclasses
import importlib
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from fake_records import RECORDS, make, store_records
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.cli.main import main
from effbench.records.metric import Metric
from effbench.report.figures import STYLES
from effbench.report.folder import MARK
from effbench.report.fronts import Fronts
from effbench.report.groups import group_records
from effbench.report.pictures import Axis, Picture, Spot, make_picture, trace_front
from effbench.stats.pareto import find_front

HOSTILE = ("<script>alert(1)</script>", r"a_b&50%#{x}\input{y}", "$x_1^{2$", "名前", "two\nlines")
STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def results(tmp_path):
    hostile = [make(name, worse=0.05 * at, bits=5 - at / 3, rng_seed=at) for at, name in enumerate(HOSTILE, 1)]
    return store_records(tmp_path / "results", [*RECORDS, *hostile]).results


def show(results, *words):
    return main(["report", f"results={results}", *words])


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_written_twice_alike(results, tmp_path, style, capsys):
    for folder in ("one", "other"):
        assert show(results, f"format={style}", f"to={tmp_path / folder}", "x=stored") == 0
    name = f"quant-v1-quick-tier-model-tiny.{style}"
    one, other = ((tmp_path / folder / name).read_bytes() for folder in ("one", "other"))
    assert one == other and one.startswith(STARTS[style]) and MARK.encode() in one
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"wrote {tmp_path / 'other' / name}" and err == ""


def test_names_are_text(results, tmp_path):
    assert show(results, "format=svg", f"to={tmp_path / 'plots'}") == 0
    root = ElementTree.parse(tmp_path / "plots" / "quant-v1-quick-tier-model-tiny.svg").getroot()
    texts = ["".join(each.itertext()).strip() for each in root.iter("{http://www.w3.org/2000/svg}text")]
    shown = {" ".join(name.split()) for name in HOSTILE}
    assert len(shown & {*texts}) >= 3, texts
    assert not [each for each in root.iter() if each.tag.endswith("script")]


def test_a_second_report_takes_the_place_of_the_first_and_of_nothing_else(results, tmp_path, capsys):
    folder = tmp_path / "plots"
    assert show(results, "format=svg", f"to={folder}") == 0 and show(results, "format=svg", f"to={folder}") == 0
    (file,) = folder.iterdir()
    file.write_text("my own drawing")
    assert show(results, "format=svg", f"to={folder}") == 2
    assert "is there and is no report; choose another folder" in capsys.readouterr().err
    assert file.read_text() == "my own drawing"


def test_axes_by_name(results, tmp_path, capsys):
    assert show(results, "format=svg", f"to={tmp_path}", "x=decode_speedup_b1_c128,bits", "y=tasks") == 0
    text = (tmp_path / "quant-v1-quick-tier-model-tiny.svg").read_text()
    for title in ("tasks, % (more is better)", "decode b1 c128 (more is better)", "bits per weight (less is better)"):
        assert title in text
    assert show(results, "format=svg", f"to={tmp_path}", "rows=rtn*,gptq*") == 0
    text = (tmp_path / "quant-v1-quick-tier-model-tiny.svg").read_text()
    assert "rtn(bits=2)" in text and "fp8_weight()" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=png"], "format=png writes files: name a folder, to=FOLDER"),
        (["to=x"], "to= is of pages and plots: add format=html, png, svg or pdf"),
        (["x=bits"], "x= and y= are axes of plots"),
        (["format=svg", "to=x", "x=storde"], "no metric that can be better or worse has this name; did you mean"),
        (["format=svg", "to=x", "y=bits,KL"], "y=bits,KL: name one quality"),
        (["format=svg", "to=x", "x=sparsity"], "x=sparsity: no metric that can be better or worse"),
        (["format=svg", "to=x", "detail=speed"], "choose by rows=, x= and y="),
        (["format=svg", "to=x", "--published"], "--published has a table of its own"),
        (["format=svg", "to=x", "rows=nothing"], "rows=nothing: no row has this name"),
        (["format=svg", "to=x", "rows=rtn(bits=2)"], "nothing to plot"),
        (["format=svg", "to=/proc/x"], "cannot write there"),
        (["format=svgz", "to=x"], "did you mean 'svg'"),
    ],
)
def test_bad_input_costs_one_line(results, words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert show(results, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_missing_package_is_named(results, tmp_path, capsys, monkeypatch):
    original = importlib.import_module

    def refuse(name, *arguments):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert show(results, "format=png", f"to={tmp_path}") == 2
    assert "format=png needs matplotlib: pip install" in capsys.readouterr().err


def test_a_name_that_is_a_file(results, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert show(results, "format=png", f"to={tmp_path / 'file'}") == 2
    assert "is a file; name a folder" in capsys.readouterr().err


# ---- what is drawn ------------------------------------------------------------------------------

number = st.integers(1, 6).map(float)


@settings(deadline=None)
@given(st.lists(st.tuples(number, number), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_the_line_divides_what_is_attained(places, more_x, more_y):
    """Every row lies on the worse side of each corner's corner point: no row is better than the line."""
    signs = np.array([-1 if more else 1 for more in (more_x, more_y)])
    values = np.array(places).T
    drawn = find_front(values * signs[:, None])
    axis = {"metric": "m", "title": "m", "unit": "", "logarithmic": False, "low": 0.0, "high": 9.0}
    spots = tuple(
        Spot(str(at), (x, x, x), (y, y, y), 1.0, "robust", bool(drawn[at])) for at, (x, y) in enumerate(places)
    )
    picture = Picture(Axis(higher=more_x, **axis), Axis(higher=more_y, **axis), spots, (), ())
    corners = trace_front(picture)
    assert {(x, y) for (x, y), on in zip(places, drawn, strict=True) if on} <= {*corners}
    for x, y in corners:
        for own_x, own_y in places:
            better = (own_x * signs[0] < x * signs[0]) and (own_y * signs[1] < y * signs[1])
            assert not better


def test_numbers_are_those_of_the_records():
    (table,) = group_records(RECORDS)
    picture = make_picture(Fronts(table).find("stored_bytes", "tasks_acc"))
    metric = table.rows[0].records[0].metrics["tasks_acc"]
    spot = next(spot for spot in picture.spots if spot.name == "baseline")
    assert spot.y == pytest.approx((100 * metric.value, 100 * metric.low, 100 * metric.high), rel=1e-5)
    assert spot.x == (16e6, 16e6, 16e6)
    assert picture.absent == (("squeezellm(bits=3)", "oom"),) and picture.y.higher and not picture.x.higher


def test_a_row_far_off_does_not_hide_the_others():
    records = [*RECORDS, make("rtn(bits=1)", worse=9.0, bits=3.0)]
    (table,) = group_records(records)
    picture = make_picture(Fronts(table).find("stored_bytes", "token_ppl"))
    far = next(spot for spot in picture.spots if spot.name == "rtn(bits=1)")
    assert far.status == "excluded" and far.y[0] > 1000 * picture.y.high / 100
    assert picture.y.high < 60 and not picture.y.logarithmic
    assert all(picture.y.low <= s.y[0] <= picture.y.high for s in picture.spots if s.status != "excluded")


def test_wide_costs_are_logarithmic():
    records = [
        dataclasses.replace(record, metrics=record.metrics | {"apply_seconds": Metric(10.0**at)})
        for at, record in enumerate(RECORDS)
    ]
    (table,) = group_records(records)
    assert make_picture(Fronts(table).find("apply_seconds", "token_ppl")).x.logarithmic


def test_files_are_named_by_their_table(results, tmp_path):
    assert show(results, "format=svg", f"to={tmp_path / 'a folder'}") == 0
    assert re.fullmatch(r"[a-z0-9-]+\.svg", next((tmp_path / "a folder").iterdir()).name)
