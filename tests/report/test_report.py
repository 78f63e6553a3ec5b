"""Tables, comparisons and generated pages, from synthetic records."""

import csv
import dataclasses
import io
import math
import re

import numpy as np
import pytest

from effbench.core import registry
from effbench.core.errors import Usage
from effbench.records.metric import Metric
from effbench.records.record import Cell, Record
from effbench.records.store import Store
from effbench.report import compare
from effbench.report import methods as docs
from effbench.report import tables as report
from effbench.report.tables import groups, headline, render, sheet, write
from effbench.stats.paired import Estimate

WINDOWS, QUESTIONS = 60, 120
PROTOCOL = "ppl.world.joined.window512.stride512.token.first-of-window-unscored.windows60.oneblock"


def make(recipe="baseline", seed=0, outcome="ok", *, worse=0.0, wrong=0, bits=16.0, rng_seed=0, **changes):
    """A record whose windows are `worse` nats worse, and whose task has `wrong` more wrong answers."""
    steps = "" if recipe == "baseline" else recipe
    cell = Cell(
        suite="quant", suite_version=1, tier="quick", recipe=recipe, steps=steps, resolved=(), model="tiny",
        data="tiny", seed=seed, settings={"threads": 1, "dtype": "float32"},
        digests={"model": "m1", "data": "d1", "tasks": "t1", "probes": "p1", "methods": recipe},
    )  # fmt: skip
    cell = dataclasses.replace(cell, **{k: changes.pop(k) for k in list(changes) if hasattr(cell, k) and k != "name"})
    noise = np.random.default_rng(rng_seed + seed)
    nll = np.random.default_rng(99).normal(2.3, 0.3, WINDOWS) + worse + noise.normal(0, 0.002, WINDOWS) * (bits < 16)
    right = [int(i >= 20 + wrong) for i in range(QUESTIONS)]
    middle, reach = float(nll.mean()), 1.96 * float(nll.std()) / math.sqrt(WINDOWS)
    share = sum(right) / QUESTIONS
    accuracy = Metric(share, share - 0.05, share + 0.05, QUESTIONS)
    metrics = {
        "token_ppl": Metric(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach), WINDOWS),
        "kl_nats_per_token": Metric(worse / 2, n=WINDOWS),
        "top1_agreement": Metric(1 - worse / 3, n=WINDOWS),
        "recall_acc": accuracy,
        "tasks_acc": accuracy,
        "bits_per_weight": Metric(bits),
        "stored_bytes": Metric(16e6 * bits / 16),
        "compression": Metric(16 / bits),
        "weight_bytes": Metric(1e6 * bits),
        "prefill_speedup_b1_c128": Metric(0.81, 0.79, 0.83, 12),
        "decode_speedup_b1_c128": Metric(1.26, 1.2, 1.31, 12),
        "decode_speedup_b8_c128": Metric(0.97, 0.95, 0.99, 12),
        "apply_seconds": Metric(1.25),
        "apply_peak_rss_bytes": Metric(2.5e7),
        "score_peak_rss_bytes": Metric(1.2e8),
    }
    values = {
        "metrics": metrics,
        "samples": {"token_ppl_window_nll": nll.tolist(), "recall_acc": right},
        "protocols": {"token_ppl": PROTOCOL, "recall_acc": "task recall v1, 0-shot"},
        "facts": {"type": "PTQ", "calibration_data": "128 sequences", "weight_update": "Hessian"} if steps else {},
        "environment": {"machine": "acme-cpu-2core"},
        "started": "2026-01-02T03:04:05+00:00",
    }
    return Record(cell=cell, outcome=outcome, **values | changes)


def failed(recipe, seed=0, outcome="oom", reason="needs 9 GiB", **changes):
    return make(recipe, seed, outcome, reason=reason, metrics={}, samples={}, protocols={}, **changes)


RECORDS = [
    make(),
    make("gptq(bits=4)", 0, worse=0.02, bits=4.25, rng_seed=1),
    make("gptq(bits=4)", 1, worse=0.021, bits=4.25, rng_seed=1),
    make("gptq(bits=4)", 2, worse=0.022, bits=4.25, rng_seed=1),
    make("rtn(bits=2)", worse=0.9, wrong=40, bits=2.25, rng_seed=2),
    make("rtn(bits=8)", worse=0.0, bits=8.25, rng_seed=3),
    make("fp8_weight()", worse=0.0, bits=8.0, rng_seed=4, simulated=True),
    failed("squeezellm(bits=3)"),
]


def table(text, title="What is saved and what is kept"):
    """Rows of one Markdown table, by recipe."""
    lines = text[text.index(f"*{title}*") :].split("\n\n")[1].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.fixture
def results(tmp_path):
    """A results folder with the records, beside a README."""
    store = Store(tmp_path / "results")
    for record in RECORDS:
        store.write(record)
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
        "recipe", "bits", "stored", "perplexity", "KL, nats", "top-1, %", "tasks, %",
        "prefill, ×", "decode, ×",
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
    (group,) = groups([make(), make("rtn(bits=4)", worse=0.5, wrong=1)])
    assert group.tests["rtn(bits=4)", "recall_acc"][1] == 1.0
    assert group.tests["rtn(bits=4)", "token_ppl"][1] < 0.05


def test_holm_counts_every_test_of_the_table():
    rows = [make(f"rtn(bits={i})", wrong=7) for i in range(2, 9)]
    (alone,) = groups([make(), rows[0]])
    (many,) = groups([make(), *rows])
    raw = 2 * 0.5**7
    # per row: perplexity, the task and the mean of the tasks
    assert alone.tests["rtn(bits=2)", "recall_acc"][1] == pytest.approx(3 * raw)
    assert many.tests["rtn(bits=2)", "recall_acc"][1] == pytest.approx(21 * raw)


def test_simulated_rows_have_no_speed():
    text = render(RECORDS, "quant")
    row = table(text)["fp8_weight() (simulated)"]
    assert row["prefill, ×"] == row["decode, ×"] == "–"
    speeds = table(text, "Speed, as a ratio to the baseline of the same run")
    assert set(speeds["fp8_weight() (simulated)"].values()) == {"fp8_weight() (simulated)", "–"}
    assert speeds["rtn(bits=8)"]["decode b8 c128"] == "0.970 ±0.020"


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

    assert cell(ppl(10.0)) == "10.00 ±89.00"
    assert cell(ppl(10.0, 10.4)) == "10.20 [10.00–10.40]"
    assert cell(ppl(10.0, 10.2, 10.4)).removesuffix(" ↑") == "10.20 ±0.50ˢ"  # 4.30 x 0.2 / sqrt(3)
    assert cell(ppl(10.0, 10.0, 10.0)).removesuffix(" ↑") == "10.00"


def test_facts_and_cost_columns():
    rows = table(render(RECORDS, "quant"), "What the methods are and what applying them costs")
    assert rows["gptq(bits=4)"] == {
        "recipe": "gptq(bits=4)", "type": "PTQ", "calibration data": "128 sequences",
        "weight update": "Hessian", "seeds": "3", "apply, s": "1.25", "apply peak (rss)": "25.0 MB",
    }  # fmt: skip
    assert rows["baseline"]["type"] == "–"


def test_recipes_with_names_of_their_own_show_their_steps():
    named = make("four bits", bits=4.25, steps="rtn(bits=4)")
    rows = table(render([make(), named], "quant"), "What the methods are and what applying them costs")
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
    assert [len(group.rows) for group in groups(records)] == [2, 2]
    assert render(records, "quant").count("*What is saved and what is kept*") == 2


def test_newest_version_and_full_tier_come_first():
    found = groups([make(), make(tier="full"), make(suite_version=2)])
    assert [(g.records[0].cell.suite_version, g.records[0].cell.tier) for g in found] == [
        (2, "quick"), (1, "full"), (1, "quick"),
    ]  # fmt: skip


def test_newer_records_take_the_place_of_older_ones():
    old = [make(), make("rtn(bits=4)", 0), make("rtn(bits=4)", 1)]
    source = dataclasses.replace(old[1].cell, digests=old[1].cell.digests | {"methods": "edited"})
    newer = dataclasses.replace(old[1], cell=source, started="2026-02-01T00:00:00+00:00")
    (group,) = groups([*old, newer])
    assert group.rows[1].records == (newer,)
    assert group.older == 2
    retrained = make(digests={"model": "m2"}, started="2026-03-01T00:00:00+00:00")
    (group,) = groups([*old, retrained])
    assert group.records == [retrained]
    assert "3 records of an older source, model or data are left out" in render([*old, retrained], "quant")


def test_a_record_without_an_environment_stays_with_its_kind():
    dead = failed("rtn(bits=4)", outcome="crashed", reason="killed by signal 9", environment={})
    (group,) = groups([make(), dead])
    assert group.rows[1].records == (dead,)


def test_protocols_that_differ_are_not_tested():
    other = make("rtn(bits=2)", worse=0.9, protocols={"token_ppl": "ppl.elsewhere", "recall_acc": "other"})
    (group,) = groups([make(), other])
    assert group.tests == {}


def test_a_renamed_row_keeps_one_place():
    old, new = (
        make("rtn-old", steps="rtn()"),
        make("rtn-new", steps="rtn()", started="2026-02-01T00:00:00+00:00"),
    )
    edited = make("rtn-new", steps="rtn(bits=3)", started="2026-03-01T00:00:00+00:00")
    assert [row.recipe for row in groups([make(), old, new])[0].rows] == ["baseline", "rtn-new"]
    assert [row.steps for row in groups([make(), old, new, edited])[0].rows] == ["", "rtn(bits=3)"]


def test_without_a_baseline_nothing_is_tested():
    (group,) = groups(RECORDS[1:])
    assert group.baseline is None and group.tests == {}
    assert "↑" not in render(RECORDS[1:], "quant")


def test_narrow_enough_for_a_terminal():
    grids = sheet(groups(RECORDS)[0]).grids
    assert all(len(grid.header) <= 10 for grid in grids)
    assert max(map(len, headline(groups(RECORDS)[0]).splitlines()[2:-4])) < 150


def test_rendering_does_not_depend_on_the_order_of_records():
    for style in report.WRITTEN:
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
    test = report.paired(rows[:1], rows[1:], "x_word_ppl")
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
    assert "What is saved" in text and "\x1b" not in text


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
    assert float(gptq["token_ppl"]) == RECORDS[1].metrics["token_ppl"].value
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
    assert report.rounded(value) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "–"),
        (Estimate(12.3456), "12.3"),
        (Estimate(12.3456, 12.1, 12.5), "12.35 ±0.25"),
        (Estimate(12.3456, 11.0, 12.5), "12.3 ±1.3"),
        (Estimate(12.3456, 12.34, 12.35), "12.346 ±0.006"),
        (Estimate(0.0123, 0.0118, 0.0128, n=3), "0.0123 ±0.0005ˢ"),
        (Estimate(1234.0, 1200.0, 1300.0), "1234 ±66"),
        (Estimate(4.592e-4, 4.3e-4, 4.882e-4), "4.59e-4 ±2.92e-5"),
        (Estimate(0.0, 0.0, 0.03), "0.00 ±0.03"),
        (Estimate(2e6, 1e6, 3e6), "2.00e6"),
        (Estimate(1.0, 1.0, 1.0), "1.00"),
    ],
)
def test_with_interval(found, text):
    assert report.with_interval(found) == text


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (4.25e6, "4.25 MB"), (16e9, "16.0 GB"), (2e15, "2000 TB")])
def test_bytes_text(size, text):
    assert report.bytes_text(size) == text


# ---- files -----------------------------------------------------------------------------------------------


def test_written_files_check_out_and_are_written_once(results, capsys):
    assert report.main({"results": str(results), "check": True}) == 1
    changed = write(results, "quant")
    assert [path.name for path in changed] == ["quant.md", "quant.csv", "quant.tex", "README.md"]
    assert write(results, "quant") == []
    assert report.main({"results": str(results), "suite": "quant", "check": True}) == 0
    readme = (results.parent / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# Top\n<!-- effbench:table quant -->\n**quant v1") and readme.endswith("Rest `x`\n")
    assert "old" not in readme and readme.count("| recipe") == 1


@pytest.mark.parametrize("name", ["results/tables/quant.md", "results/tables/quant.csv", "README.md"])
def test_check_names_a_hand_edited_file_and_its_line(results, name, capsys):
    write(results)
    path = results.parent / name
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "gptq" in line)
    lines[at] = lines[at].replace("4.25", "3.25")
    path.write_text("".join(lines), encoding="utf-8")
    assert report.main({"results": str(results), "check": True}) == 1
    said = capsys.readouterr().err
    assert f"{path.name}: line {at + 1} differs" in said
    assert "3.25" in said


def test_check_sees_lines_cut_off(results, capsys):
    write(results)
    path = results / "tables" / "quant.tex"
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    assert report.main({"results": str(results), "check": True}) == 1
    assert "(no such line)" in capsys.readouterr().err


def test_a_block_of_a_suite_without_records_is_named(results):
    readme = results.parent / "README.md"
    readme.write_text("<!-- effbench:table quantt -->\n<!-- /effbench:table -->\n", encoding="utf-8")
    with pytest.raises(Usage, match=r"README.md: no records of suite 'quantt'; did you mean 'quant'"):
        write(results)
    assert write(results, "quant")


@pytest.mark.parametrize("style", report.WRITTEN)
def test_printing_gives_the_committed_file(results, style, capsys):
    write(results)
    assert report.main({"results": str(results), "suite": "quant", "format": style}) == 0
    assert capsys.readouterr().out == (results / "tables" / f"quant.{style}").read_text(encoding="utf-8")


def test_recipes_from_the_command_line_are_written_only_by_name(results):
    Store(results).write(make("rtn(bits=5)", suite="adhoc"))
    write(results)
    assert report.main({"results": str(results), "check": True}) == 0
    assert not (results / "tables" / "adhoc.md").exists()
    assert [path.stem for path in write(results, "adhoc")] == ["adhoc"] * 3


def test_foreign_files_are_named_and_skipped(results, capsys):
    (results / "records" / "quant" / "v1" / "cut.json").write_text('{"schema": 1, "cel')
    assert report.main({"results": str(results), "format": "md"}) == 0
    assert "cut.json: skipped" in capsys.readouterr().err


def test_last_attempt_counts(results, capsys):
    Store(results).write(make("squeezellm(bits=3)", bits=3.25, attempt=2))
    report.main({"results": str(results), "format": "csv"})
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["outcome"] for row in rows if row["recipe"] == "squeezellm(bits=3)"] == ["ok"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "nothing"}, "no records of suite 'nothing'"),
        ({"format": "mdd"}, "did you mean 'md'"),
        ({"suite": "../x"}, "not the name of a suite"),
    ],
)
def test_wrong_usage(results, options, message):
    with pytest.raises(Usage, match=message):
        report.main({"results": str(results)} | options)


# ---- compare ---------------------------------------------------------------------------------------------


def test_compare_recipes_by_name(results, capsys):
    options = {"a": "baseline", "b": "rtn(bits=2)", "results": str(results), "suite": "quant"}
    assert compare.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    ppl = next(line for line in lines if "token_ppl" in line)
    assert re.search(r"\+14\d.\d+ % .*\+14\d.\d+ to \+14\d.\d+ % .*\*", ppl)
    recall = next(line for line in lines if "recall_acc" in line)
    assert "40, 0" in recall and "-42 to -25" in recall and "*" in recall


def test_compare_files_with_themselves(results, capsys):
    path = next((results / "records").rglob("rtn_bits_8*.json"))
    assert compare.main({"a": str(path), "b": str(path)}) == 0
    assert " *" not in capsys.readouterr().out.split("Paired")[0]


def test_compare_pairs_seeds_with_the_one_seed_of_the_other_side(results):
    before, after = compare.sides(("baseline", "gptq(bits=4)"), results, None)
    text = compare.compare(before, after)
    assert "seed 0, 1, 2" in text and "token_ppl" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": {"token_ppl": "p64"}}, "token_ppl was measured as .*window512.* and as 'p64'"),
        ({"model": "other"}, "model is tiny for one and other for the other"),
        ({"digests": {"model": "m1", "data": "d2", "tasks": "t1"}}, "the data digest is d1 for one and d2"),
        ({"samples": {}}, "no metric of both has results per item"),
    ],
)
def test_compare_refuses_what_was_measured_differently(change, message):
    rows = [report.Row((record,)) for record in (make(), make("rtn(bits=4)", **change))]
    with pytest.raises(Usage, match=message) as caught:
        compare.compare(*rows)
    assert "\n" not in str(caught.value)


def test_compare_answers_unknown_names(results):
    with pytest.raises(Usage, match="did you mean 'rtn"):
        compare.main({"a": "baseline", "b": "rtn(bits=9)", "results": str(results)})
    Store(results).write(make("rtn(bits=3)", tier="full"))
    with pytest.raises(Usage, match="never measured alike"):
        compare.main({"a": "rtn(bits=2)", "b": "rtn(bits=3)", "results": str(results)})


# ---- docs ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A source tree with one method."""
    package = tmp_path / "effbench"
    (package / "methods" / "quant").mkdir(parents=True)
    (tmp_path / "methods").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (package / "methods" / "quant" / "wanda.py").write_text(
        '"""Wanda: |weight| x norm."""\n'
        "@dataclass(frozen=True)\nclass Wanda(Weights):\n"
        '    paper = "arXiv:2306.11695"\n'
        "    sparsity: float = 0.5\n    group_size: int | None = None\n"
    )
    monkeypatch.setattr(docs, "PACKAGE", package)
    monkeypatch.setattr(registry, "PACKAGE", package)
    registry._catalog.cache_clear()
    yield tmp_path
    registry._catalog.cache_clear()


def test_index_of_methods(checkout, capsys):
    assert docs.main({"check": True}) == 1
    assert docs.main({}) == 0
    text = (checkout / "methods" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "wanda" in line)
    assert row == (
        r"| [wanda](quant/wanda.py) | Weights | Wanda: \|weight\| x norm. | "
        "[arXiv:2306.11695](https://arxiv.org/abs/2306.11695) | "
        r"`sparsity: float = 0.5`<br>`group_size: int \| None = None` |"
    )
    assert docs.main({"check": True}) == 0


def test_stale_index_is_named_with_its_line(checkout, capsys):
    docs.main({})
    path = checkout / "methods" / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("0.5", "0.6"), encoding="utf-8")
    assert docs.main({"check": True}) == 1
    assert re.search(r"README.md: line \d+ differs", capsys.readouterr().err)


def test_a_broken_method_file_is_not_indexed(checkout):
    (checkout / "effbench" / "methods" / "quant" / "bad.py").write_text("class Other: pass\n")
    with pytest.raises(Usage, match=r"bad\.py defines no class"):
        docs.main({})


def test_no_pages_outside_a_checkout(checkout):
    (checkout / "pyproject.toml").unlink()
    with pytest.raises(Usage, match="source checkout"):
        docs.main({})
