"""Tables, comparisons and generated pages, from synthetic records."""

import csv
import dataclasses
import fnmatch
import io
import math
import re

import numpy as np
import pytest
from fake_records import PROTOCOL, RECORDS, failed, make, store_records
from hypothesis import given
from hypothesis import strategies as st

from effbench.cells import suite as suites
from effbench.cli.commands import report
from effbench.cli.main import main
from effbench.core.errors import Usage
from effbench.core.paths import CHECKOUT
from effbench.core.usage import parse
from effbench.records.metric import Metric
from effbench.records.store import Store
from effbench.report import pages
from effbench.report.blocks import AgainstBlock, TableBlock, list_documents, render_table
from effbench.report.choice import Choice
from effbench.report.columns import DETAILS, SERVED, list_columns
from effbench.report.differences import compute_tests, estimate_difference
from effbench.report.groups import group_records
from effbench.report.metrics import get_limits, get_scale, get_title, select, select_quality
from effbench.report.pages import check, render, write
from effbench.report.sheets import make_sheets
from effbench.report.text import bytes_text, rounded, with_interval
from effbench.stats.paired import Estimate


def table(text, title="Size and quality"):
    """Rows of one Markdown table, by recipe."""
    lines = text[text.index(f"*{title}*") :].split("\n\n")[1].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.fixture
def results(tmp_path):
    """A results folder with the records, beside a README."""
    store_records(tmp_path / "results")
    (tmp_path / "README.md").write_text(
        "# Top\n<!-- effbench:table quant -->\nold\n<!-- /effbench:table -->\n\nRest `x`\n", encoding="utf-8"
    )
    return tmp_path / "results"


# ---- tables ----------------------------------------------------------------------------------------------


def test_markdown_rows_columns_and_numbers():
    rows = table(render(RECORDS, "quant"))
    assert list(rows) == [
        "baseline", "fp8_weight() (simulated)", "gptq(bits=4)", "rtn(bits=2)", "rtn(bits=8)",
        "squeezellm(bits=3): oom¹",
    ]  # fmt: skip
    assert list(rows["baseline"]) == [
        "recipe", "bits", "perplexity", "KL, nats", "tasks, %", "stored", "decode, ×", "prefill, ×",
    ]  # fmt: skip
    assert rows["gptq(bits=4)"]["bits"] == "4.25"
    assert rows["gptq(bits=4)"]["stored"] == "4.25 MB (3.76×)"
    assert rows["rtn(bits=2)"]["decode, ×"] == "1.26 ±0.06"


def test_the_arrows_mark_what_differs_from_the_baseline():
    rows = table(render(RECORDS, "quant"))
    assert rows["rtn(bits=2)"]["perplexity"].endswith("↑")
    assert rows["gptq(bits=4)"]["perplexity"].endswith("↑")
    assert rows["rtn(bits=2)"]["tasks, %"].endswith("↓")
    for recipe in ("baseline", "rtn(bits=8)"):
        assert "↑" not in "".join(rows[recipe].values()) and "↓" not in "".join(rows[recipe].values())


def test_one_wrong_answer_more_is_no_difference():
    (group,) = group_records([make(), make("rtn(bits=4)", worse=0.5, wrong=1)])
    assert compute_tests(group)["rtn(bits=4)", "recall_acc"].p == 1.0
    assert compute_tests(group)["rtn(bits=4)", "token_ppl"].p < 0.05


def test_holm_counts_every_test_of_the_table():
    rows = [make(f"rtn(bits={i})", wrong=7) for i in range(2, 9)]
    (alone,) = group_records([make(), rows[0]])
    (many,) = group_records([make(), *rows])
    raw = 2 * 0.5**7
    # per row: perplexity, the task and the mean of the tasks
    assert compute_tests(alone)["rtn(bits=2)", "recall_acc"].p == pytest.approx(3 * raw)
    assert compute_tests(many)["rtn(bits=2)", "recall_acc"].p == pytest.approx(21 * raw)


def test_simulated_rows_have_no_speed():
    text = render(RECORDS, "quant")
    row = table(text)["fp8_weight() (simulated)"]
    assert row["prefill, ×"] == row["decode, ×"] == "–"
    speeds = table(text, DETAILS["speed"])
    assert set(speeds["fp8_weight() (simulated)"].values()) == {"fp8_weight() (simulated)", "–"}
    assert speeds["rtn(bits=8)"]["decode b8 c128, ×"] == "0.970 ±0.020"


def test_a_merge_that_gave_up_zeros_says_so():
    dense = make("wanda(), lora(merge='dense')", worse=0.1, log={"densified": ["model.layers.0.mlp.up_proj"]})
    text = render([make(), dense], "quant")
    assert "wanda(), lora(merge='dense') (densified)" in table(text)
    assert "Densified: a merge filled the zeros" in text and "Densified" not in render(RECORDS, "quant")


def test_outcome_and_reason_are_shown():
    text = render(RECORDS, "quant")
    assert set(table(text)["squeezellm(bits=3): oom¹"].values()) == {"squeezellm(bits=3): oom¹", "–"}
    assert "¹ oom: needs 9 GiB" in text
    assert "8 cells: 7 ok, 1 oom" in text


def test_no_mean_over_a_shrunken_set():
    records = [make(), make("gptq(bits=4)", 0), make("gptq(bits=4)", 1), failed("gptq(bits=4)", 2)]
    rows = table(render(records, "quant"))
    assert set(rows["gptq(bits=4): oom¹"].values()) == {"gptq(bits=4): oom¹", "–"}
    assert "¹ 1 of 3 seeds, oom: needs 9 GiB" in render(records, "quant")


def test_what_a_refused_row_measured_stays():
    refused = failed("rtn(bits=4)", outcome="refused", reason="quality of random weights means nothing")
    refused = dataclasses.replace(refused, metrics={"bits_per_weight": Metric(4.25)})
    row = table(render([make(), refused], "quant"))["rtn(bits=4): refused¹"]
    assert row["bits"] == "4.25"
    assert row["perplexity"] == "–"


def test_seeds_are_aggregated():
    def ppl(*values):
        pairs = enumerate(values)
        return [make("gptq()", seed, metrics={"token_ppl": Metric(value, 0.0, 99.0)}) for seed, value in pairs]

    def cell(records):
        return table(render([make(), *records], "quant"))["gptq()"]["perplexity"]

    assert cell(ppl(10.0)) == "10.00 [1.00–99.00]"  # no perplexity is below 1
    assert cell(ppl(10.0, 10.4)) == "10.20 [10.00–10.40]ˢ"
    assert cell(ppl(10.0, 10.2, 10.4)).removesuffix(" ↑") == "10.20 ±0.50ˢ"  # 4.30 x 0.2 / sqrt(3)
    assert cell(ppl(10.0, 10.0, 10.0)).removesuffix(" ↑") == "10.00"


def test_facts_and_cost_columns():
    rows = table(render(RECORDS, "quant"), "Methods and the cost of applying them")
    assert rows["gptq(bits=4)"] == {
        "recipe": "gptq(bits=4)", "type": "PTQ", "calibration data": "128 sequences",
        "weight update": "Hessian", "kernels": "–", "seeds": "3", "apply, s": "1.25", "apply peak (rss)": "25.0 MB",
    }  # fmt: skip
    assert rows["baseline"]["type"] == "–"


def test_recipes_with_names_of_their_own_show_their_steps():
    named = make("four bits", bits=4.25, steps="rtn(bits=4)")
    rows = table(render([make(), named], "quant"), "Methods and the cost of applying them")
    assert rows["four bits"]["steps"] == "rtn(bits=4)"


def test_caption_says_where_the_numbers_come_from():
    later = dataclasses.replace(RECORDS[4], started="2026-01-05T00:00:00+00:00")
    text = render([*RECORDS[:4], later, *RECORDS[5:]], "quant").replace("\\", "")
    for words in (
        "quant v1, quick tier, model tiny",
        "acme-cpu-2core",
        "threads 1",
        "2026-01-02 to 2026-01-05",
    ):
        assert words in text
    assert f"Perplexity: {PROTOCOL}." in text


@pytest.mark.parametrize(
    "change",
    [
        {"suite_version": 2},
        {"tier": "full"},
        {"model": "other"},
        {"data": "text"},
        {"settings": {"threads": 2, "dtype": "float32"}},
        {"environment": {"machine": "other-gpu"}},
    ],
)
def test_only_like_is_put_beside_like(change):
    records = [make(), make("rtn(bits=4)"), make(**change), make("rtn(bits=4)", **change)]
    assert [len(group.rows) for group in group_records(records)] == [2, 2]
    assert render(records, "quant").count("*Size and quality*") == 2


def test_newest_version_and_full_tier_come_first():
    found = group_records([make(), make(tier="full"), make(suite_version=2)])
    assert [(g.records[0].cell.suite_version, g.records[0].cell.tier) for g in found] == [
        (2, "quick"), (1, "full"), (1, "quick"),
    ]  # fmt: skip


def test_newer_records_take_the_place_of_older_ones():
    old = [make(), make("rtn(bits=4)", 0), make("rtn(bits=4)", 1)]
    source = dataclasses.replace(old[1].cell, digests=old[1].cell.digests | {"methods": "edited"})
    newer = dataclasses.replace(old[1], cell=source, started="2026-02-01T00:00:00+00:00")
    (group,) = group_records([*old, newer])
    assert group.rows[1].records == (newer,)
    assert group.older == 2
    retrained = make(digests={"model": "m2"}, started="2026-03-01T00:00:00+00:00")
    (group,) = group_records([*old, retrained])
    assert group.records == [retrained]
    assert "3 records of an older source, model or data left out" in render([*old, retrained], "quant")


def test_a_record_without_an_environment_stays_with_its_kind():
    dead = failed("rtn(bits=4)", outcome="crashed", reason="killed by signal 9", environment={})
    (group,) = group_records([make(), dead])
    assert group.rows[1].records == (dead,)


def test_protocols_that_differ_are_not_tested():
    other = make("rtn(bits=2)", worse=0.9, protocols={"token_ppl": "ppl.elsewhere", "recall_acc": "other"})
    (group,) = group_records([make(), other])
    assert compute_tests(group) == {}


def test_a_renamed_row_keeps_one_place():
    old, new = (
        make("rtn-old", steps="rtn()"),
        make("rtn-new", steps="rtn()", started="2026-02-01T00:00:00+00:00"),
    )
    edited = make("rtn-new", steps="rtn(bits=3)", started="2026-03-01T00:00:00+00:00")
    assert [row.recipe for row in group_records([make(), old, new])[0].rows] == ["baseline", "rtn-new"]
    assert [row.steps for row in group_records([make(), old, new, edited])[0].rows] == ["", "rtn(bits=3)"]


def test_without_a_baseline_nothing_is_tested():
    (group,) = group_records(RECORDS[1:])
    assert group.baseline is None and compute_tests(group) == {}
    assert "↑" not in render(RECORDS[1:], "quant")


def test_narrow_enough_for_a_terminal():
    grids = make_sheets(group_records(RECORDS))[0].grids
    assert all(len(grid.header) <= 10 for grid in grids)
    lines = render_table(group_records(RECORDS), TableBlock(), "quant.md").splitlines()
    assert max(len(line) for line in lines if line.startswith("|")) < 150


@pytest.mark.parametrize("served", [(), SERVED])
@pytest.mark.parametrize("asked", [(), ("sparsity_asked",)])
def test_a_headline_has_at_most_eight_columns_whatever_was_measured(asked, served):
    """All that any version knows; what is not in it stands in another detail."""
    names = [name for detail in list_columns().values() for column in detail for name in column.metrics]
    measured = sorted({"kl_nats_per_token", "top1_agreement", *names} - {"sparsity_asked", *SERVED} | {*asked, *served})
    record = make("rtn(bits=2)", metrics={name: Metric(0.5) for name in measured})
    sheet = make_sheets(group_records([record]))[0]
    assert sheet.grids[0].detail == "summary" and len(sheet.grids[0].header) == 8
    assert ("zeros, %" in sheet.grids[0].header) == (bool(asked) and not served)
    assert ("cache, B/token (kept, %)" in sheet.grids[0].header) == bool(served)
    shown = {header for grid in sheet.grids for header in grid.header}
    assert {"top-1, %", "bits", "weights", "task, %"} <= shown


def test_rates_and_times_stand_beside_ratios_where_a_machine_is_named():
    timed = make().metrics | {
        "decode_tok_per_s_b1_c128": Metric(121.4), "decode_ms_per_token_b1_c128": Metric(8.2372),
        "prefill_tok_per_s_b1_c128": Metric(9876.5), "decode_tok_per_s_b8_c128": Metric(971.0),
    }  # fmt: skip
    there, without, simulated = (
        make("rtn(bits=4)", metrics=timed),
        make("rtn(bits=3)"),
        make("rtn(bits=2)", metrics=timed, simulated=True),
    )
    text = render([there, without, simulated], "quant")
    cells = {name: row["decode, × (tok/s, ms)"] for name, row in table(text).items()}
    assert cells == {
        "rtn(bits=4)": "1.26 ±0.06 (121, 8.24)", "rtn(bits=3)": "1.26 ±0.06", "rtn(bits=2) (simulated)": "–",
    }  # fmt: skip
    assert table(text)["rtn(bits=4)"]["prefill, × (tok/s)"] == "0.810 ±0.020 (9876)"
    assert table(text, DETAILS["speed"])["rtn(bits=4)"]["decode b8 c128, × (tok/s)"] == "0.970 ±0.020 (971)"
    assert "in brackets what was timed on this machine" in text
    nowhere = render([dataclasses.replace(there, environment={})], "quant")
    assert table(nowhere)["rtn(bits=4)"]["decode, ×"] == "1.26 ±0.06" and "timed on this machine" not in nowhere


def test_rendering_does_not_depend_on_the_order_of_records():
    for style in ("md", "csv", "tex"):
        assert render(RECORDS, "quant", style) == render(RECORDS[::-1], "quant", style)


def test_intervals_of_seeds_and_of_items_are_told_apart():
    rows = table(render(RECORDS, "quant"))
    assert "ˢ" in rows["gptq(bits=4)"]["perplexity"]
    assert "ˢ" not in rows["rtn(bits=2)"]["perplexity"]


def test_perplexity_over_texts_is_paired_by_text():
    words = np.random.default_rng(0).integers(50, 200, 30)
    rows = []
    for recipe, worse in (("baseline", 0.0), ("rtn()", 0.05)):
        sums = [[-float(n) * (3.0 + worse + 0.01 * (n % 3)), int(n)] for n in words]
        mean = -sum(s for s, _ in sums) / sum(n for _, n in sums)
        rows.append(make(recipe, metrics={"x_word_ppl": Metric(math.exp(mean))}, samples={"x_word_ppl": sums}))
    test = estimate_difference(rows[:1], rows[1:], "x_word_ppl")
    assert test is not None
    assert test.value == pytest.approx(0.05)
    before, after = (row.metrics["x_word_ppl"].value for row in rows)
    assert math.log(after / before) == pytest.approx(0.05)
    assert test.p < 0.001


def test_unknown_suite_is_usage():
    with pytest.raises(Usage, match="did you mean 'quant'"):
        render(RECORDS, "quants")


def test_terminal_format_shows_the_same_cells():
    text = render(RECORDS, "quant", "rich")
    assert "15.95" not in text and "rtn(bits=2)" in text and "\x1b" not in text


# ---- formats ---------------------------------------------------------------------------------------------


def test_csv_has_one_row_per_record_and_the_agreed_columns():
    rows = list(csv.reader(io.StringIO(render(RECORDS, "quant", "csv"))))
    header, body = rows[0], rows[1:]
    assert header[:10] == [
        "suite", "suite_version", "recipe", "steps", "model", "seed",
        "outcome", "reason", "simulated", "machine",
    ]  # fmt: skip
    assert header[-2:] == ["tier", "record"]
    assert len(body) == len(RECORDS)
    at = header.index("token_ppl")
    assert header[at : at + 3] == ["token_ppl", "token_ppl_low", "token_ppl_high"]
    assert "stored_bytes" in header and "stored_bytes_low" not in header
    gptq = dict(zip(header, body[2], strict=True))
    assert (gptq["recipe"], gptq["seed"], gptq["simulated"]) == ("gptq(bits=4)", "0", "false")
    kept = RECORDS[1].metrics
    assert gptq["token_ppl"] == f"{kept['token_ppl'].value:.10g}" != repr(kept["token_ppl"].value)
    counts = {name: metric.value for name, metric in kept.items() if metric.value.is_integer()}
    assert counts and all(float(gptq[name]) == value for name, value in counts.items())
    oom = dict(zip(header, body[-1], strict=True))
    assert (oom["outcome"], oom["reason"], oom["token_ppl"]) == ("oom", "needs 9 GiB", "")


def test_csv_survives_commas_quotes_and_newlines():
    text = render([make(), failed("rtn(bits=4, group_size=32)", reason='a "b",\nc')], "quant", "csv")
    last = list(csv.reader(io.StringIO(text)))[-1]
    assert last[2] == "rtn(bits=4, group_size=32)" and last[7] == 'a "b", c'


NASTY = r"50% of $x_1 & <b>|y|</b> #1 ~ ^ {z} \n `code` [a](b) *c* _d_"


def test_latex_is_escaped():
    text = render([make(), failed("rtn(group_size=32)", reason=NASTY)], "quant", "tex")
    assert r"rtn(group\_size=32): oom\textsuperscript{1}" in text
    assert r"50\% of \$x\_1 \& \textless{}b\textgreater{}\textbar{}y\textbar{}" in text
    assert r"\textbackslash{}n \textasciigrave{}code\textasciigrave{}" in text
    body = text[text.index("\n") :]
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    assert body.count(r"\begin{table}") == body.count(r"\end{table}") > 1
    assert text.isascii()


def test_markdown_is_escaped():
    text = render([make(), failed("rtn(group_size=32, pattern='a|b')", reason=NASTY)], "quant")
    assert r"rtn(group_size=32, pattern='a\|b')" in text
    assert r"50% of \$x_1 \& \<b>|y|\</b> #1 \~ ^ {z} \\n \`code\` \[a](b) \*c\* \_d\_" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) > 1 for line in tables)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.00012345, "1.23e-4"), (0.0123, "0.0123"), (9.999, "10.0"), (12.345, "12.3"),
        (1234.5, "1234"), (123456, "1.23e5"), (-2.5, "-2.50"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_rounded(value, text):
    assert rounded(value) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "–"),
        (Estimate(12.3456), "12.3"),
        (Estimate(12.3456, 12.1, 12.55), "12.35 ±0.25"),
        (Estimate(12.3456, 11.2, 13.2), "12.3 ±1.1"),
        (Estimate(12.3456, 11.0, 12.5), "12.3 [11.0–12.5]"),
        (Estimate(12.3456, 12.3456, 14.5), "12.3 [12.3–14.5]"),
        (Estimate(12.3456, 12.34, 12.35), "12.346 ±0.006"),
        (Estimate(0.0123, 0.0118, 0.0128, n=3), "0.0123 ±0.0005ˢ"),
        (Estimate(1234.0, 1180.0, 1300.0), "1234 ±66"),
        (Estimate(4.592e-4, 4.3e-4, 4.882e-4), "4.59e-4 ±2.92e-5"),
        (Estimate(0.0, 0.0, 0.03), "0.00 [0.00–0.03]"),
        (Estimate(2e6, 1e6, 3e6), "2.00e6"),
        (Estimate(1.0, 1.0, 1.0), "1.00"),
    ],
)
def test_with_interval(found, text):
    assert with_interval(found) == text


@pytest.mark.parametrize(
    ("metric", "value", "low", "high", "text"),
    [
        ("tasks_acc", 1.0, 0.89, 1.0, "100 [89–100]"),
        ("tasks_acc", 0.0938, 0.03, 0.2422, "9 [3–24]"),
        ("tasks_acc", 0.5, 0.4, 0.6, "50.0 ±10.0"),
        ("top1_agreement", 0.9966, 0.9902, 0.9989, "99.7 [99.0–99.9]"),
        ("token_ppl", 1.4, 0.9, 2.2, "1.4 [1.0–2.2]"),
        ("kl_nats_per_token", 0.474, -0.028, 0.976, "0.474 [0.000–0.976]"),
        ("decode_speedup_b1_c1", 0.3, -0.1, 0.7, "0.3 [0.0–0.7]"),
    ],
)
def test_no_interval_leaves_what_is_possible(metric, value, low, high, text):
    shown = with_interval(Estimate(value, low, high), get_scale(metric), limits=get_limits(metric))
    bounds = [float(number) for number in re.findall(r"[\d.]+", shown.partition("[")[2])]
    assert all(
        get_limits(metric)[0] * get_scale(metric) <= bound <= get_limits(metric)[1] * get_scale(metric)
        for bound in bounds
    )
    assert ("[" in shown) == ("[" in text)


@pytest.mark.parametrize(
    ("metric", "title", "scale", "limits"),
    [
        ("token_ppl", "perplexity", 1, (1, math.inf)),
        ("wiki_word_ppl", "wiki word ppl", 1, (1, math.inf)),
        ("tasks_acc", "tasks, %", 100, (0, 1)),
        ("my_task_exact_match", "my task, %", 100, (0, 1)),
        ("gsm8k_exact_match_flexible-extract", "gsm8k exact match flexible-extract", 100, (0, 1)),
        ("my_task_acc_norm", "my task acc norm", 100, (0, 1)),
        ("decode_speedup_b8_c128", "decode b8 c128", 1, (0, math.inf)),
        ("score_peak_rss_bytes", "score peak (rss)", 1, (0, math.inf)),
        ("of_another_version", "of another version", 1, (0, math.inf)),
    ],
)
def test_what_a_metric_is_comes_from_its_definition(metric, title, scale, limits):
    assert (get_title(metric), get_scale(metric), get_limits(metric)) == (title, scale, limits)


def test_metrics_are_chosen_by_kind_and_of_a_task_its_first_filter():
    names = [
        "a_acc", "a_acc_norm", "a_exact_match", "b_exact_match", "b_exact_match_strict", "tasks_acc", "x_word_ppl",
        "token_ppl", "flips", "decode_speedup_b16_c1", "decode_speedup_b2_c1", "graph_node_us", "of_another_version",
    ]  # fmt: skip
    assert select_quality(names) == ["token_ppl", "x_word_ppl", "tasks_acc", "a_acc", "b_exact_match"]
    assert select(names, "speed", "ratio") == ["decode_speedup_b2_c1", "decode_speedup_b16_c1"]


@given(
    st.sampled_from(["tasks_acc", "top1_agreement", "token_ppl", "kl_nats_per_token", "decode_speedup_b1_c1"]),
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 3),
)  # fmt: skip
def test_what_an_interval_prints_is_possible(metric, value, below, above, seeds):
    """Also for means over seeds, whose symmetric interval knows no bounds."""
    least, most = get_limits(metric)
    value = value if math.isfinite(most) else least + 20 * value
    shown = with_interval(
        Estimate(value, value - below, value + above, n=seeds), get_scale(metric), limits=get_limits(metric)
    )
    numbers = [float(number) for number in re.findall(r"\d[\d.]*(?:e-?\d+)?", shown)]
    if "±" in shown:
        numbers = [numbers[0] - numbers[1], numbers[0] + numbers[1]]
    rounding = 0.5 * get_scale(metric) * 0.02 + 0.51
    assert min(numbers) >= least * get_scale(metric) - rounding and max(numbers) <= most * get_scale(metric) + rounding


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (4.25e6, "4.25 MB"), (16e9, "16.0 GB"), (2e15, "2000 TB")])
def test_bytes_text(size, text):
    assert bytes_text(size) == text


# ---- files -----------------------------------------------------------------------------------------------


@pytest.fixture
def readme(results):
    """The README beside the results folder."""
    return results.parent / "README.md"


def test_written_files_check_out_and_are_written_once(results, readme):
    assert len(check(results, None, readme)) == 4
    changed = write(results, "quant", readme)
    assert [path.name for path in changed] == ["quant.json", "quant.md", "quant.csv", "README.md"]
    assert write(results, "quant", readme) == []
    assert check(results, "quant", readme) == []
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Top\n<!-- effbench:table quant -->\n**quant v1") and text.endswith("Rest `x`\n")
    assert "old" not in text and text.count("| recipe") == 1


def test_only_the_published_folder_has_a_readme(results, readme, monkeypatch, capsys):
    before = readme.read_text(encoding="utf-8")
    assert main(["report", f"results={results}", "--write"]) == 0
    assert readme.read_text(encoding="utf-8") == before
    for module in (report, pages):
        monkeypatch.setattr(module, "PUBLISHED", results)
    monkeypatch.setattr(pages, "CHECKOUT", results.parent)
    assert main(["report", "--check"]) == 1
    assert main(["report", "--write"]) == 0
    assert "**quant v1" in readme.read_text(encoding="utf-8")
    assert main(["report", "--check"]) == 0


@pytest.mark.parametrize("name", ["results/tables/quant.md", "results/tables/quant.csv", "README.md"])
def test_check_names_a_hand_edited_file_and_its_line(results, readme, name):
    write(results, None, readme)
    path = results.parent / name
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "gptq" in line)
    lines[at] = lines[at].replace("4.25", "3.25")
    path.write_text("".join(lines), encoding="utf-8")
    (difference_,) = check(results, None, readme)
    assert f"{path.name}: line {at + 1} differs" in difference_
    assert "3.25" in difference_


def test_check_warns_of_an_older_source_and_does_not_fail(results, capsys):
    """Every change of the source would else fail it, whatever the records say."""
    write(results)
    assert main(["report", f"results={results}", "--check"]) == 0
    assert "warning: suite quant: 8 of 8 records were measured by an older source; run it" in capsys.readouterr().err
    assert pages.count_stale(RECORDS, lambda record: False) == []


def test_check_sees_lines_cut_off(results, capsys):
    write(results)
    path = results / "tables" / "quant.csv"
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    assert main(["report", f"results={results}", "--check"]) == 1
    assert "(no such line)" in capsys.readouterr().err


def test_a_block_of_a_suite_without_records_is_named(results, readme):
    readme.write_text("<!-- effbench:table quantt -->\n<!-- /effbench:table -->\n", encoding="utf-8")
    with pytest.raises(Usage, match=r"README.md: no records of suite 'quantt'; did you mean 'quant'"):
        write(results, None, readme)
    assert write(results, "quant", readme)


def plant(readme, marker):
    readme.write_text(f"# Top\n<!-- effbench:table {marker} -->\n<!-- /effbench:table -->\n", encoding="utf-8")


def test_a_block_has_the_rows_columns_and_tier_of_its_marker_and_links_the_rest(results, readme, capsys):
    for record in (make(tier="full"), make("rtn(bits=4)", bits=4.0, tier="full"), make(model="other")):
        Store(results).write(record)
    plant(readme, "quant tier=quick model=tiny rows=gptq(bits=4),rtn* columns=bits,kl")
    write(results, None, readme)
    assert check(results, None, readme) == []
    text = readme.read_text(encoding="utf-8")
    assert "**quant v1, quick tier, model tiny.**" in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]
    assert lines[0] == ["recipe", "bits", "KL, nats"]
    assert [line[0] for line in lines[2:]] == ["baseline", "gptq(bits=4)", "rtn(bits=2)", "rtn(bits=8)"]
    assert "4 of 6 rows; all rows, columns and tiers: [`results/tables/quant.md`](results/tables/quant.md).\n" in text
    assert "fp8" not in text and "oom: " not in text
    plant(readme, "quant")
    write(results, None, readme)
    assert "**quant v1, full tier, model tiny.**" in readme.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("quant rows=gptq(bits=5)", "rows=gptq(bits=5): no row has this name; did you mean 'gptq(bits=4)'"),
        ("quant columns=bitz", "columns=bitz: no column or metric has this name; did you mean 'bits'"),
        ("quant tier=real", "unknown tier 'real'; there is quick"),
        ("quant model=smollm2", "unknown model 'smollm2'"),
        ("quant row=x", "unknown option 'row'"),
        ("quant rows", "write rows=VALUE"),
        ("quant twelve", "options are written key=value"),
    ],
)
def test_a_marker_that_names_nothing_says_where(results, readme, marker, message):
    plant(readme, marker)
    before = readme.read_text(encoding="utf-8")
    with pytest.raises(Usage) as caught:
        write(results, None, readme)
    assert str(caught.value).startswith(f"{readme}: effbench:table {marker}: ") and message in str(caught.value)
    assert readme.read_text(encoding="utf-8") == before and not (results / "tables").exists()


@pytest.mark.parametrize(
    "proof, kernels, simulated, shown",
    [
        ({"verdict": "proven"}, {"int_linear": {"triton": 3}}, False, "1.26"),
        ({"verdict": "fallback"}, {"int_linear": {"triton": 3}}, False, "–"),
        ({"verdict": "simulated"}, {}, True, "–"),
        (None, {"int_linear": {"reference": 3}}, False, "–"),  # older records have dispatch alone
        (None, {}, False, "1.26"),
    ],
)
def test_no_speed_up_is_shown_of_what_is_not_proven(proof, kernels, simulated, shown):
    log = {} if proof is None else {"proof": proof}
    row = make("rtn(bits=4)", kernels=kernels, simulated=simulated, log=log)
    text = render([make(), row], "quant", "md", "speed")
    header, _, _, line = (line for line in text.splitlines() if line.startswith("|"))
    cells = dict(zip(header.split("|"), line.split("|"), strict=True))
    (decode,) = (cell for name, cell in cells.items() if name.strip().startswith("decode b1"))
    assert decode.strip().startswith(shown)
    (prefill,) = (cell for name, cell in cells.items() if name.strip().startswith("prefill b1"))
    assert prefill.strip().startswith("–" if simulated else "0.81")  # what it costs is shown


@pytest.mark.parametrize("lost, told", [(1.07, True), (0.2, False)])
def test_a_row_says_that_merging_lost_what_it_learned(lost, told):
    row = make("lora()", metrics={"token_ppl": Metric(9.0), "merge_lost": Metric(lost)})
    text = render([make(), row], "quant")
    assert ("merged and rounded again, with an error of 107 % of what was trained" in text) == told


def test_rows_stand_against_one_of_them_in_a_page_of_the_docs(results, readme, capsys):
    """As `effbench compare` sets them side by side, corrected over the block."""
    page = readme.parent / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(
        "<!-- effbench:against quant tier=quick row=rtn(bits=8) rows=gptq*,rtn(bits=2) metric=token_ppl -->\n"
        "<!-- /effbench:against -->\n"
    )
    assert page in write(results, None, readme) and check(results, None, readme) == []
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("|")]
    found = {line[0].replace("\\", "").strip(): [cell.strip() for cell in line] for line in lines[2:]}
    assert found.keys() == {"gptq(bits=4)", "rtn(bits=2)"}
    assert found["rtn(bits=2)"][-1] == "worse" and found["rtn(bits=2)"][3].startswith("+")
    assert main(["compare", "rtn(bits=8)", "rtn(bits=2)", f"results={results}", "tier=quick"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| token_ppl"))
    assert [cell.strip() for cell in line.strip("| ").split(" | ")][1:5] == found["rtn(bits=2)"][1:5]


@pytest.mark.parametrize(
    "marker, message",
    [
        ("quant row=rtn(bits=7) rows=gptq* metric=token_ppl", "unknown row 'rtn(bits=7)'; did you mean"),
        ("quant row=baseline rows=gpt metric=token_ppl", "no row has this name"),
        ("quant row=rtn(bits=8) rows=rtn(bits=8) metric=token_ppl", "name rows other than"),
        ("quant row=rtn(bits=8) rows=gptq* metric=token_pl", "did you mean 'token_ppl'"),
        ("quant rows=gptq* metric=token_ppl", "name row=, the rows="),
    ],
)
def test_a_marker_of_rows_against_one_says_what_is_wrong(results, readme, marker, message):
    readme.write_text(f"<!-- effbench:against {marker} -->\n<!-- /effbench:against -->\n", encoding="utf-8")
    with pytest.raises(Usage) as caught:
        write(results, None, readme)
    assert str(caught.value).startswith(f"{readme}: effbench:against {marker}: ") and message in str(caught.value)


@pytest.mark.parametrize(("bits", "fits"), [(range(11), True), (range(12), False)])
def test_a_block_of_more_than_twelve_rows_fails_the_check(tmp_path, bits, fits, monkeypatch, capsys):
    """The baseline is one of the twelve."""
    results, readme = tmp_path / "results", tmp_path / "README.md"
    for record in (make(), *(make(f"rtn-{one}", worse=0.1) for one in bits)):
        Store(results).write(record)
    for module in (report, pages):
        monkeypatch.setattr(module, "PUBLISHED", results)
    monkeypatch.setattr(pages, "CHECKOUT", tmp_path)
    plant(readme, "quant")
    assert main(["report", "--write"]) == 0
    told = f"{readme}: effbench:table quant: 13 rows, at most 12; choose with rows=NAME,PATTERN behind it"
    assert (told in capsys.readouterr().err) == (not fits)
    assert main(["report", "--check"]) == int(not fits)
    assert (told in capsys.readouterr().err) == (not fits)
    plant(readme, "quant rows=rtn-1*")
    assert main(["report", "--write"]) == main(["report", "--check"]) == 0


@pytest.mark.skipif(CHECKOUT is None, reason="no README here")
def test_the_rows_of_the_readme_are_those_of_the_suites():
    """So that publishing a suite anew does not find rows named that it no longer has."""
    texts = [path.read_text(encoding="utf-8") for path in list_documents(CHECKOUT / "README.md")]
    markers = re.findall("<!-- effbench:(table|against) (.*) -->", "".join(texts))
    assert {kind for kind, _ in markers} == {"table", "against"}
    for kind, marker in markers:
        name, *options = marker.split()
        block, suite = parse(TableBlock if kind == "table" else AgainstBlock, options), suites.load(name)
        names = {recipe.name for recipe in suite.tiers[block.tier or "full"].recipes} | {"baseline"}
        for row in (*Choice.read(block.rows, None).rows, *([block.row] if kind == "against" else [])):
            assert fnmatch.filter(names, row), (name, row)


@pytest.mark.parametrize("style", ["md", "csv"])
def test_printing_gives_the_committed_file(results, style, capsys):
    write(results)
    assert main(["report", f"results={results}", "suite=quant", f"format={style}"]) == 0
    text = capsys.readouterr().out
    if style == "md":  # what the records cannot know is printed and not written
        assert " 6 of 6 rows were measured by an older source, model or data." in text
        text = "<!-- Generated by `effbench report suite=quant --write`; do not edit. -->\n\n" + text
    text = text.replace(" 6 of 6 rows were measured by an older source, model or data.", "")
    assert text == (results / "tables" / f"quant.{style}").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [[], ["--published"], ["detail=speed"], ["suite=quant"]])
@pytest.mark.parametrize("style", ["md", "tex", "rich"])
def test_what_is_printed_may_be_edited(results, style, words, capsys):
    assert main(["report", f"results={results}", f"format={style}", *words]) == 0
    assert not re.search("do not edit|--write|Generated by", capsys.readouterr().out)


def test_recipes_from_the_command_line_are_written_only_by_name(results):
    Store(results).write(make("rtn(bits=5)", suite="adhoc"))
    write(results)
    assert check(results) == []
    assert not (results / "tables" / "adhoc.md").exists()
    assert [path.stem for path in write(results, "adhoc")] == ["adhoc"] * 3


def test_foreign_files_are_named_and_skipped(results, capsys):
    (results / "records" / "quant" / "v1" / "cut.json").write_text('{"schema": 1, "cel')
    assert main(["report", f"results={results}", "format=md"]) == 0
    assert "cut.json: skipped" in capsys.readouterr().err


def test_last_attempt_counts(results, capsys):
    Store(results).write(make("squeezellm(bits=3)", bits=3.25, attempt=2))
    main(["report", f"results={results}", "format=csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["outcome"] for row in rows if row["recipe"] == "squeezellm(bits=3)"] == ["ok"]


def test_own_runs_are_reported_by_default(results, monkeypatch, capsys):
    monkeypatch.chdir(results.parent)
    assert main(["report", "suite=quant"]) == 2
    assert "no records of suite 'quant' in runs/records" in capsys.readouterr().err
    results.rename("runs")
    assert main(["report", "suite=quant"]) == 0
    assert "gptq(bits=4)" in capsys.readouterr().out


def test_one_detail_is_one_grid(results, capsys):
    assert main(["report", f"results={results}", "detail=speed"]) == 0
    text = capsys.readouterr().out
    assert "decode b8 c128" in text and "tasks, %" not in text


@pytest.mark.parametrize("style", ["md", "tex", "rich"])
@pytest.mark.parametrize("detail", ["quality", "speed", "memory", "compute", "methods"])
def test_a_detail_that_was_not_measured_says_so_and_what_there_is(tmp_path, detail, style, capsys):
    bare = make(metrics={"token_ppl": Metric(5.0)}, steps="")
    Store(tmp_path).write(bare)
    assert main(["report", f"results={tmp_path}", f"format={style}", f"detail={detail}"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    there = "summary, methods"
    if detail != "methods":
        assert f"Nothing was measured of detail={detail} (" in text and f"there is detail={there}." in text
    assert ("not measured." in text) == (detail == "methods")  # a legend of marks without a table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["suite=nothing"], "no records of suite 'nothing'"),
        (["format=mdd"], "did you mean 'md'"),
        (["detail=speeds"], "did you mean 'speed'"),
        (["detail=published"], "unknown detail 'published'"),
        (["--published", "format=csv"], "--published has a table of its own"),
        (["detail=speed", "format=csv"], "leave out detail="),
        (["--write", "detail=speed"], "are of whole pages"),
        (["--write", "format=tex"], "are of whole pages"),
        (["--write", "--check"], "give one of them"),
        (["suite=../x"], "not the name of a suite"),
        (["suite=/etc"], "not the name of a suite"),
        (["suite=*"], "not the name of a suite"),
        (["suite=a\0b"], "must be text"),
        (["suite=" + "x" * 5000], "not the name of a suite"),
        (["results=" + "x" * 5000], "x...: File name too long"),
        (["results=" + "x" * 500], "x...: File name too long"),
        (["results=" + "x/" * 2045], "cannot be read (File name too long)"),
        (["results=" + "x/" * 550], "no records in x/x/"),
        (["results=a\0b"], "must be text"),
        (["results=a\nb"], "not the name of a folder"),
    ],
)
@pytest.mark.parametrize("command", [["report"], ["report", "--check"], ["compare", "a", "b"]])
def test_wrong_usage(results, command, words, message, capsys):
    if command[0] == "compare" and not words[0].startswith(("suite", "results")):
        return
    given = words if words[0].startswith("results=") else [*words, f"results={results}"]
    assert main([*command, *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert err.count("\n") == 1 and len(err) < 1500


def test_a_caption_says_how_the_files_of_the_model_store_it():
    types = "Q4_1 linears, Q8_0 embedding and head, F32 norms"
    told = [make(log={"model_types": types}), make("rtn()", bits=4, log={"model_types": types}), failed("gptq()")]
    assert f"The model's files hold {types}." in render(told, "quant", "md")
    assert "The model's files" not in render([make(), make("rtn()", bits=4)], "quant", "md")


def test_caveats_of_methods_are_footnotes_of_their_rows():
    told = {"caveats": ["Movement: 10 epochs in the paper", "GMP: not from the start"]}
    first = make("movement()", facts=told)
    other = failed("gmp()", facts={"caveats": told["caveats"][1:]})
    text = render([make(), first, other], "quant")
    assert {"baseline", "gmp()¹: oom²", "movement()³ ¹"} == set(table(text))
    assert "¹ GMP: not from the start" in text and "³ Movement: 10 epochs in the paper" in text
    assert render([make(), make("rtn()", facts={"caveats": 7})], "quant")  # a damaged record


def test_rates_of_fits_are_printed():
    chosen = make("fit(lr=(0.0001, 0.001))", log={"fits": [{"lr": 0.001, "rates": {"0.0001": 2.0, "0.001": 1.0}}]})
    twice = make("lottery_ticket()", log={"fits": [{"lr": 0.001}, {"lr": 0.0003}, {"lr": 0.001}]})
    damaged = make("gmp()", log={"fits": [7, {"lr": "x"}]})
    found = table(render([make(), chosen, twice, damaged], "quant", "md"), "Methods and the cost of applying them")
    rates = {name: row["learning rate"] for name, row in found.items()}
    assert rates == {
        "baseline": "–", "fit(lr=(0.0001, 0.001))": "0.001", "lottery_ticket()": "0.0003, 0.001", "gmp()": "–",
    }  # fmt: skip
    assert "learning rate" not in render([make(), make("rtn()")], "quant", detail="methods")


def test_zeros_are_a_column_where_any_row_is_sparse():
    def sparse(recipe, **shares):
        return make(
            recipe, metrics={"token_ppl": Metric(9.0), **{name: Metric(value) for name, value in shares.items()}}
        )

    dense, rounded = sparse("baseline", sparsity=0.0), sparse("rtn(bits=2)", sparsity=0.31)
    pruned = sparse("wanda(sparsity=0.6)", sparsity=0.59996, sparsity_asked=0.6)
    rows = table(render([dense, rounded, pruned], "quant"))
    assert {name: row["zeros, %"] for name, row in rows.items()} == {
        "baseline": "0.0", "rtn(bits=2)": "31.0", "wanda(sparsity=0.6)": "60.0 (60)",
    }  # fmt: skip
    assert "zeros, %" not in table(render([dense, rounded], "quant"))["baseline"]  # rounding alone asks for none


@pytest.mark.parametrize("name", ["=1+1", "+a", "-b", "@SUM(A1)", "\tx"])
def test_no_text_of_the_csv_is_a_formula(name):
    record = make(
        name, reason=name, outcome="oom", metrics={"token_ppl": Metric(5.0), "tasks_over_random": Metric(-0.25)}
    )
    (line,) = csv.DictReader(io.StringIO(render([record], "quant", "csv")))
    assert not any(value[:1] in "=+@\t" for value in line.values() if value)
    assert line["recipe"] == f"'{name}" and float(line["tasks_over_random"]) == -0.25
