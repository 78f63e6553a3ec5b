"""Rows and columns by name, in every format."""

import csv
import io
import re

import pytest
from fake_records import RECORDS, make, store_records

from effbench.cli.main import main
from effbench.core.errors import Usage
from effbench.records.metric import Metric
from effbench.records.store import Store
from effbench.report.choice import Choice
from effbench.report.columns import MOST, list_columns, make_columns
from effbench.report.differences import compute_tests
from effbench.report.groups import group_records
from effbench.report.pages import render
from effbench.report.sheets import make_sheets

NAMES = ["baseline", "gptq(bits=4)", "rtn(bits=2)", "rtn(bits=8)"]


@pytest.fixture
def results(tmp_path):
    return store_records(tmp_path / "results").results


def show(results, *words):
    return main(["report", f"results={results}", *words])


@pytest.mark.parametrize(
    ("style", "recipe"),
    [("md", r"^\| ([a-z]\S*)"), ("rich", r"^([a-z]\S*)  "), ("tex", r"^([a-z]\S*) &"), ("csv", r"^quant,1,([^,]+),")],
)
def test_rows_and_columns_in_every_format(results, style, recipe, capsys):
    assert show(results, f"format={style}", "rows=gptq*,rtn*", "columns=bits,KL,decode_speedup_b8*") == 0
    text = capsys.readouterr().out
    found = [name for name in re.findall(recipe, text, re.M) if name != "recipe"]
    assert list(dict.fromkeys(found)) == NAMES
    if style == "csv":
        header = next(csv.reader(io.StringIO(text)))
        assert header[10:-2] == [
            "bits_per_weight", "decode_speedup_b8_c128", "decode_speedup_b8_c128_low", "decode_speedup_b8_c128_high",
            "kl_nats_per_token",
        ]  # fmt: skip
    else:
        header = next(line for line in text.splitlines() if line.strip("| ").startswith("recipe"))
        cells = re.split(r"\s*[|&]\s*|\s{2,}", header.strip("| \\").replace(r"$\times$", "×"))
        assert [cell.strip("{}") for cell in cells] == ["recipe", "bits", "KL, nats", "decode b8 c128, ×"]


def test_a_choice_changes_no_number(results):
    """Arrows stand for tests over the whole table, whatever is shown of it."""
    records = [make(), *(make(f"rtn(bits={bits})", wrong=7 + bits) for bits in range(2, 9))]
    (table,) = group_records(records)
    (whole,), (part,) = make_sheets([table]), make_sheets([table], choice=Choice.read("rtn(bits=2)", "tasks,token_ppl"))
    assert [row[0] for row in part.grids[0].rows] == ["baseline", "rtn(bits=2)"] and part.omitted == 6
    at = [whole.grids[0].header.index(name) for name in part.grids[0].header]
    lines = {row[0]: tuple(row[place] for place in at) for row in whole.grids[0].rows}
    assert all(lines[row[0]] == row for row in part.grids[0].rows)
    assert part.caption == whole.caption and len(compute_tests(table)) == 21


def test_a_metric_without_a_column_can_be_chosen():
    records = [make(metrics={"token_ppl": Metric(5.0), "flips": Metric(0.25, 0.2, 0.3)})]
    assert "25.0 ±5.0" in make_sheets(group_records(records), choice=Choice.read(None, "flips"))[0].grids[0].rows[0]


def test_commas_in_the_brackets_of_a_recipe_are_part_of_it():
    assert Choice.read("gptq(bits=3, damp=0.1),rtn*, nf4()", "bits").rows == ("gptq(bits=3, damp=0.1)", "rtn*", "nf4()")
    assert Choice.read(None, None) == Choice()


def test_a_comma_before_a_unit_is_part_of_a_header():
    headers = [column.header for columns in list_columns().values() for column in columns]
    assert {"KL, nats", "zeros, %", "apply, s", "decode, × (tok/s, ms)"} <= {*headers}
    for header in headers:
        assert Choice.read(None, header).columns == (header,)
    assert Choice.read(None, ",".join(headers)).columns == tuple(headers)
    assert Choice.read(None, "KL,nats , bits,top-1, %").columns == ("KL, nats", "bits", "top-1, %")
    assert Choice.read(None, "nats, bits, ").columns == ("nats", "bits")
    (sheet,) = make_sheets(group_records(RECORDS), choice=Choice.read(None, "tasks, %, KL, nats, apply, s"))
    assert sheet.grids[0].header == ("recipe", "tasks, %", "KL, nats", "apply, s")


def test_bytes_without_a_column_are_printed_as_bytes():
    records = [make(metrics={"token_ppl": Metric(5.0), "reference_bytes": Metric(2.5e6)})]
    assert (
        make_sheets(group_records(records), choice=Choice.read(None, "reference*"))[0].grids[0].rows[0][1] == "2.50 MB"
    )


@pytest.mark.parametrize("speeds", [(), ("decode",)])
def test_bits_stand_beside_zeros_where_there_is_room(speeds):
    names = ["token_ppl", "kl_nats_per_token", "tasks_acc", "stored_bytes", "bits_per_weight", "sparsity"]
    names += ["sparsity_asked", *(f"{phase}_speedup_b1_c128" for phase in speeds)]
    summary = [column.header for column in make_columns(names)["summary"]]
    assert summary[:2] == ["zeros, %", "bits"] and len(summary) < MOST
    full = make_columns([*names, "decode_speedup_b1_c128", "prefill_speedup_b1_c128"])["summary"]
    assert full[0].header == "zeros, %" and "bits" not in {column.header for column in full} and len(full) < MOST
    dense = make_columns([name for name in names if name != "sparsity_asked"])["summary"]
    assert dense[0].header == "bits" and "zeros, %" not in {column.header for column in dense}


def test_a_column_chosen_twice_is_one_and_has_its_place():
    (sheet,) = make_sheets(group_records(RECORDS), choice=Choice.read(None, "tasks,bits,*acc,bits_per_weight"))
    assert sheet.grids[0].header == ("recipe", "tasks, %", "bits", "recall, %")


def test_tables_without_what_is_chosen_are_left_out():
    records = [*RECORDS, make(tier="full"), make("nf4()", tier="full", metrics={"graph_node_us": Metric(2.0)})]
    tables = group_records(records)
    assert [sheet.title for sheet in make_sheets(tables, choice=Choice(rows=("nf4()",)))] == [
        "quant v1, full tier, model tiny"
    ]
    assert len(make_sheets(tables, choice=Choice(columns=("graph_node_us",)))) == 1
    assert render(RECORDS, "quant", choice=Choice(rows=("nf4()",))) == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rows=gptq(bits=5)"], "rows=gptq(bits=5): no row has this name; did you mean 'gptq(bits=4)'"),
        (["rows=" + "x" * 5000], "no row has this name"),
        (["columns=bitz"], "did you mean 'bits'"),
        (["columns=bits,[", "format=csv"], "columns=[: no column or metric has this name"),
        (["tier=full"], "tier=full: no records of it; there is quick"),
        (["model=other"], "model=other: no records of it; there is tiny"),
        (["detail=speed", "columns=bits"], "both choose columns"),
        (["layout=paper"], "layout= is of LaTeX: add format=tex"),
        (["layout=papers", "format=tex"], "did you mean 'paper'"),
        (["--published", "rows=rtn*"], "--published has a table of its own"),
        (["--published", "layout=paper", "format=tex"], "--published has a table of its own"),
        (["--write", "rows=rtn*"], "are of whole pages"),
        (["--check", "tier=quick"], "are of whole pages"),
        (["--glossary", "suite=quant"], "leave out all options"),
    ],
)
def test_a_choice_of_nothing_costs_one_line(results, words, message, capsys):
    if "--glossary" not in words:
        words = [*words, f"results={results}"]
    assert main(["report", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and len(err) < 1500


def test_the_same_tables_by_tier_and_model(results, capsys):
    for record in (make(tier="full"), make(model="other")):
        Store(results).write(record)
    assert show(results, "tier=quick", "model=other", "format=md") == 0
    text = capsys.readouterr().out
    assert "quick tier, model other" in text and "model tiny" not in text and "full tier" not in text


def test_a_detail_says_how_to_get_the_rest(results, capsys):
    assert show(results, "suite=quant", "detail=summary", "format=md") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "More: effbench report suite=quant detail=NAME, of quality, front, speed, memory, replication, methods; or "
    )


def test_bounds_in_the_csv_stay_in_range():
    record = make(metrics={"kl_nats_per_token": Metric(0.1, -0.2, 0.4), "tasks_acc": Metric(0.9, 0.7, 1.1)})
    (row,) = csv.DictReader(io.StringIO(render([record], "quant", "csv")))
    assert (row["kl_nats_per_token_low"], row["kl_nats_per_token_high"]) == ("0.0", "0.4")
    assert (row["tasks_acc_low"], row["tasks_acc_high"]) == ("0.7", "1.0")


def test_unknown_rows_raise():
    with pytest.raises(Usage, match="no row has this name"):
        Choice(rows=("x",)).check(group_records(RECORDS))
