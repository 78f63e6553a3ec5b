"""Tables for a paper: short captions, labels, notes, and no wider or taller than a page."""

import functools
import re
import shutil
import subprocess

import pytest
from fake_records import RECORDS, failed, make

from effbench.core.paths import PUBLISHED
from effbench.records.metric import Metric
from effbench.report.choice import Choice
from effbench.report.groups import group_records
from effbench.report.pages import load, render
from effbench.report.sheets import Grid, make_sheets
from effbench.report.styles import tex
from effbench.report.styles.tex import TALL, escape

LONG = "sparsegpt(pattern='2:4', bits=4), lora(rank=16), fit(steps=100, lr=0.001)"
NASTY = r"50% of $x_1 & <b>|y|</b> #1 ~ ^ {z} \n `code` [a](b) *c* _d_ " + "a_very.long/name=" * 12
MANY = [make(), *(make(f"rtn-{row}", worse=0.01 * row) for row in range(2 * TALL))]


@functools.cache
def write_published(suite, **choice):
    return render(load(PUBLISHED, suite), suite, "paper", choice=Choice.read(choice.get("rows"), choice.get("columns")))


def compile_pages(folder, *texts):
    """The log of pdflatex on an article in one column that includes the tables."""
    for number, text in enumerate(texts):
        (folder / f"table{number}.tex").write_text(text, encoding="utf-8")
    inputs = "\n".join(f"\\input{{table{number}}}\\clearpage" for number in range(len(texts)))
    (folder / "paper.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs,graphicx,siunitx}\n\\begin{document}\n"
        + inputs
        + "\n\\end{document}\n",
        encoding="utf-8",
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=60)
    return done.returncode, (folder / "paper.log").read_text(encoding="utf-8", errors="replace")


def has_latex():
    """Whether there is a LaTeX with the packages that the tables need."""
    if shutil.which("pdflatex") is None or shutil.which("kpsewhich") is None:
        return False
    found = subprocess.run(
        ["kpsewhich", "booktabs.sty", "graphicx.sty", "siunitx.sty"], capture_output=True, text=True, timeout=60
    )
    return len(found.stdout.split()) == 3


latex = pytest.mark.skipif(not has_latex(), reason="needs pdflatex with booktabs, graphicx and siunitx")


def test_a_table_has_a_short_caption_a_label_and_its_protocol_as_a_note():
    text = render(RECORDS, "quant", "paper")
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    assert r"\caption{quant v1, quick tier, model tiny: size and quality.}" in text
    assert r"\label{tab:quant-v1-quick-tier-model-tiny-summary}" in text
    note = text[text.index(r"\parbox{\linewidth}") :]
    assert "window512" in note and "acme-cpu-2core" in note and "95 \\%" in note
    assert text.index(r"\end{tabular}") < text.index(r"\parbox{\linewidth}") < text.index(r"\end{table}")
    assert text.isascii()


def test_what_does_not_fit_is_left_out_and_named_but_chosen_columns_stay():
    few = {"token_ppl": Metric(9.0, 8.0, 10.0), "bits_per_weight": Metric(4.0), "tasks_acc": Metric(0.5, 0.4, 0.6)}
    text = render([make(metrics=few), make("rtn(bits=4)", metrics=few)], "quant", "paper")
    assert "9.000 +- 1.000" in text and "Left out" not in text
    text = render([make(), make(LONG)], "quant", "paper")
    assert "Left out for want of room: intervals; perplexity" in text and "prefill, $" not in text.partition("Left")[0]
    chosen = render(
        [make(), make(LONG)], "quant", "paper", choice=Choice.read(None, "bits,token_ppl,kl,tasks,stored,decode")
    )
    header = next(line for line in chosen.splitlines() if line.startswith("recipe"))
    assert header.count("&") == 6 and "Left out" not in chosen


def test_numbers_stand_below_each_other_with_their_marks():
    grid = Grid("chosen", ("recipe", "ppl", "stored", "gain"), (
        ("a", "5.452 ±0.418", "2.97 MB", "-0.5"), ("b", "15.95 ±1.38ˢ ↑", "1 MB", "–"), ("c", "5 ↓ ∅", "3 MB", "2.25"),
    ), frozenset({(1, 1), (2, 2)}))  # fmt: skip
    text = tex._write_tabular(grid)
    marks = r"table-space-text-post={\textsuperscript{s} $\uparrow$}"
    assert text.startswith(rf"\begin{{tabular}}{{lS[table-format=2.3(4),{marks}]rS[table-format=-1.2]}}")
    assert r"recipe & {ppl} & stored & {gain} \\" in text
    assert r"a & 5.452 +- 0.418 & 2.97 MB & -0.5 \\" in text
    assert r"b & \bfseries 15.95 +- 1.38 {\textsuperscript{s} $\uparrow$} & 1 MB & {--} \\" in text
    assert r"c & 5 {$\downarrow$ ∅} & \textbf{3 MB} & 2.25 \\" in text


def test_bold_is_what_is_surely_better_than_all_others():
    rows = [make(), make("a()", worse=0.3), make("b()", worse=0.1, rng_seed=1, bits=8), make("c()", worse=0.2)]
    text = render(rows, "quant", "paper", choice=Choice.read(None, "token_ppl,tasks"))
    bold = [line for line in text.splitlines() if r"\bfseries" in line]
    assert len(bold) == 1 and bold[0].startswith("b()") and "Bold: better than every other row" in text
    tie = [make(), make("a()", worse=0.1, bits=8), make("b()", worse=0.1, bits=8, rng_seed=3)]
    assert r"\bfseries" not in render(tie, "quant", "paper") and "Bold" not in render(tie, "quant", "paper")
    assert r"**" not in render(rows, "quant", "md", "summary").split("| recipe")[1]


@latex
def test_a_name_of_commands_is_set_as_it_is(tmp_path):
    text = render([make(), make(r"a_b&50%#{x}\input{y}", worse=0.1)], "quant", "paper")
    code, log = compile_pages(tmp_path, text)
    assert code == 0 and "y.tex" not in log
    done = subprocess.run(
        ["pdftotext", "-layout", "paper.pdf", "-"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert r"a b&50%#{x}\input{y}" in done.stdout  # an underscore is a rule and no letter


def test_tall_tables_become_several_with_labels_of_their_own():
    text = render(MANY, "quant", "paper")
    labels = re.findall(r"\\label\{(.*?)\}", text)
    assert len(labels) == len(set(labels)) == 3 and labels[1] == f"{labels[0]}-2"
    assert max(part.count(r"\\") for part in text.split(r"\begin{table}")) <= TALL + 1
    assert text.count("continued") == 2 and text.count(r"\parbox") == 1
    assert all(f"rtn-{row} &" in text for row in range(2 * TALL))


@latex
def test_no_box_is_too_wide_and_no_float_too_tall(tmp_path):
    texts = [
        render(RECORDS, "quant", "paper"),
        render([make(), make(LONG), failed("rtn(bits=1)", reason=NASTY)], "quant", "paper"),
        render([make(), make(LONG)], "quant", "paper", choice=Choice.read(None, "*")),
        render(MANY, "quant", "paper"),
        render(RECORDS, "quant", "paper", "methods"),
        render([make(), make(LONG)], "quant", "tex"),
        render(MANY, "quant", "tex"),
    ]
    if PUBLISHED is not None and PUBLISHED.is_dir():
        texts += [
            write_published("quant"),
            write_published("prune"),
            write_published("quant", rows="gptq*,rtn*", columns="bits,token_ppl,kl"),
        ]
    code, log = compile_pages(tmp_path, *texts)
    assert code == 0, log[-2000:]
    assert not re.findall(r"^Overfull.*|^LaTeX Warning: Float too large.*|.*multiply defined.*", log, re.M)


@latex
def test_a_table_that_is_too_wide_is_seen(tmp_path):
    """What the test above looks for is written into the log."""
    wide = render([make(), make(LONG)], "quant", "tex").replace(r"\effbenchfit{\begin", r"{\begin")
    code, log = compile_pages(tmp_path, wide)
    assert code == 0 and re.search(r"^Overfull", log, re.M)


@pytest.mark.parametrize("style", ["tex", "paper"])
@pytest.mark.parametrize("detail", [None, "summary", "speed", "methods"])
def test_every_table_is_made_to_fit_and_none_is_taller_than_a_page(style, detail):
    """What can be seen without LaTeX."""
    for records in (RECORDS, MANY, [make(), make(LONG)]):
        text = render(records, "quant", style, detail)
        tables = text.split(r"\begin{table}")[1:]
        assert tables and text.count(r"\usepackage{booktabs,graphicx,siunitx}") == text.count(r"\providecommand") == 1
        for table in tables:
            assert table.count(r"\effbenchfit{\begin{tabular}") == table.count(r"\begin{tabular}") == 1
            assert table.partition(r"\midrule")[2].partition(r"\bottomrule")[0].count(r"\\") <= TALL
        labels = re.findall(r"\\label{(.*?)}", text)
        assert len(labels) == len(tables) == len(set(labels))


def test_a_page_has_every_column_of_its_grids():
    (sheet,) = make_sheets(group_records(RECORDS))
    text = render(RECORDS, "quant", "tex")
    for grid in sheet.grids:
        assert " & ".join(map(escape, grid.header)) in re.sub(r"{([^{}]*)}(?= &| \\\\)", r"\1", text)
    assert text.count(escape(sheet.legend)[:40]) == 1


def test_sheets_have_one_grid_of_chosen_columns():
    (sheet,) = make_sheets(group_records(RECORDS), choice=Choice.read(None, "bits,stored"))
    assert [grid.detail for grid in sheet.grids] == ["chosen"] and "summary" in sheet.details
