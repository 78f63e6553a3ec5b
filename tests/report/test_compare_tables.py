"""Whole folders, publications and git revisions compared row by row, with an exit code for CI."""

import json
import math
import subprocess

import numpy as np
import pytest
from fake_records import RECORDS, failed, make, store_records
from scipy import stats

from effbench.cli.main import main
from effbench.core.paths import PUBLISHED
from effbench.records.publication import publish_records
from effbench.records.record import Metric
from effbench.report.changes import find_changes
from effbench.report.compare_tables import compare_tables
from effbench.report.groups import Row, Table, group_records
from effbench.report.pages import load
from effbench.report.sides import Tables
from effbench.report.verdicts import Effects

POINT = "b1_c128"


def run(*words):
    return main(["compare", *map(str, words)])


@pytest.fixture
def results(tmp_path):
    return store_records(tmp_path / "results").results


def replaced(**changes):
    """The records, one of them another: `rtn(bits=8)`."""
    return [one for one in RECORDS if one.cell.recipe != "rtn(bits=8)"] + [make("rtn(bits=8)", rng_seed=3, **changes)]


def test_a_folder_with_itself(results, capsys):
    assert run(results, results, "fail_on=better,worse,faster,slower,smaller,larger,failed,missing") == 0
    out = capsys.readouterr().out
    assert "5 rows of both" in out and "indistinguishable" in out and "| row" not in out


def test_verdicts_and_the_exit_code(results, tmp_path, capsys):
    other = store_records(tmp_path / "other", replaced(worse=0.5, wrong=30, bits=9.0)).results
    assert run(results, other) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| rtn(bits=8)")]
    words = {line.split("|")[2].strip(): line.split("|")[-2].strip() for line in lines}
    assert words["token_ppl"] == words["recall_acc"] == "worse" and words["stored_bytes"] == "larger"
    assert not any(line.startswith("| gptq") for line in out.splitlines())
    assert run(results, other, "fail_on=worse,slower") == 1
    assert run(other, results, "fail_on=worse,slower,larger") == 0
    assert run(results, other, "fail_on=larger", "effect=20") == 0
    assert run(results, other, "fail_on=worse", "rows=gptq*") == 0


def test_rows_that_failed_are_missing_new_or_measured_otherwise(results, tmp_path, capsys):
    records = [one for one in RECORDS if one.cell.recipe not in ("rtn(bits=8)", "fp8_weight()", "squeezellm(bits=3)")]
    records = [one for one in records if one.cell.recipe != "rtn(bits=2)"]
    records += [failed("rtn(bits=8)"), make("wanda()"), make("squeezellm(bits=3)")]
    records += [make("rtn(bits=2)", protocols={"token_ppl": "another"})]
    other = store_records(tmp_path / "other", records).results
    assert run(results, other, "fail_on=failed") == 1
    out = capsys.readouterr().out
    assert "failed (oom: needs 9 GiB): rtn(bits=8)" in out and "missing: fp8_weight()" in out
    assert "new: wanda()" in out and "mended (was oom): squeezellm(bits=3)" in out
    assert "incomparable (token_ppl was measured as" in out and "and as 'another' for the other): rtn(bits=2)" in out
    assert [run(results, other, f"fail_on={word}") for word in ("missing", "incomparable", "worse")] == [1, 1, 0]


def test_json_for_machines(results, tmp_path, capsys):
    other = store_records(
        tmp_path / "other", replaced(worse=0.5, metrics=make().metrics | {"weight_bytes": Metric(0.0)})
    ).results
    assert run(results, other, "--json", "fail_on=worse") == 1
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    worse = next(row for row in rows if row["verdict"] == "worse" and row["metric"] == "token_ppl")
    assert worse["place"] == "quant, quick tier, model tiny" and worse["row"] == "rtn(bits=8)"
    assert worse["b-a"] == pytest.approx(worse["b"] - worse["a"]) and worse["low"] < worse["b-a"] < worse["high"]
    assert worse["p"] <= worse["p_holm"] <= 0.05
    assert any(row["metric"] == "weight_bytes" and row["b/a"] == 0 and row["p"] is None for row in rows)


def test_all_tests_are_corrected_together(results, tmp_path):
    other = store_records(tmp_path / "other", replaced(worse=0.5)).results
    sides = [Tables("", tuple(group_records(load(folder)))) for folder in (results, other)]
    comparison = compare_tables(sides[0], sides[1], Effects())
    tested = [one for one in comparison.findings if one.p is not None]
    assert len(tested) > 20 and len({one.row for one in tested}) == 5
    least = min(tested, key=lambda one: one.change.test.p)
    assert least.p == pytest.approx(min(1, len(tested) * least.change.test.p))


def test_publications_and_record_folders(tmp_path, capsys):
    folder = tmp_path / "results"
    records = [one for one in RECORDS if one.cell.recipe != "squeezellm(bits=3)"]
    file = publish_records(records, folder, "quick")
    assert run(file, folder) == run(file.parent, file) == 0
    assert "indistinguishable" in capsys.readouterr().out


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True)


@pytest.fixture
def history(tmp_path, monkeypatch):
    """A repository whose second commit has worse results, with a work tree that is neither."""
    folder = tmp_path / "repository"
    git(tmp_path, "init", "-q", "-b", "main", str(folder))
    store_records(folder / "results")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    for path in (folder / "results").rglob("rtn_bits_8*.json"):
        path.unlink()
    store_records(folder / "results", replaced(worse=0.5))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "second")
    (folder / "results" / "local.txt").write_text("mine")
    monkeypatch.chdir(folder)
    return folder


def test_git_revisions(history, capsys):
    assert run("HEAD~1", "HEAD", "fail_on=worse") == 1
    out = capsys.readouterr().out
    assert "A: HEAD~1 (" in out and "| rtn(bits=8) | token_ppl" in out
    assert run("HEAD", "results", "fail_on=better,worse") == 0  # a folder of the work tree
    assert run("HEAD:results", "main~1:results", "fail_on=better") == 1
    assert run("HEAD~1", "HEAD", "results=results", "fail_on=worse") == 1
    assert [path.name for path in (history / "results").glob("*.txt")] == ["local.txt"]
    status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    assert status == "?? results/local.txt\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("HEAD:elsewhere", "HEAD"), "elsewhere: cannot be read at"),
        (("HEAD:/etc", "HEAD"), "is in no git repository"),
        (("HEAD~9", "HEAD"), "'HEAD~9' is neither a record file nor a recipe with records, nor a folder or a git"),
        (("HEAD:results/tables", "HEAD"), "results/tables: cannot be read at"),
        (("HEAD:results/samples", "HEAD"), "HEAD:results/samples: no records at this revision"),
        (("HEAD", "HEAD", "suite=nosuch"), "HEAD: no records of suite nosuch at this revision"),
        (("HEAD", "HEAD", "tier=full"), "tier=full: no records of it"),
        (("HEAD", "rtn(bits=8)", "results=results"), "is a row and HEAD ("),
        (("HEAD", "HEAD", "fail_on=wrose"), "did you mean 'worse'"),
        (("HEAD", "HEAD", "fail_on=,"), "name verdicts, such as"),
        (("HEAD", "HEAD", "effect=-1"), "effect=-1: must be a number"),
        (("HEAD", "HEAD", "rows=qqq"), "rows=qqq: no row has this name"),
        (("baseline", "rtn(bits=8)", "results=results", "rows=rtn*"), "leave it out where two rows are named"),
    ],
)
def test_wrong_names_cost_one_line(history, capsys, words, message):
    assert run(*words) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_places_without_a_row_in_common(results, tmp_path, capsys):
    other = store_records(tmp_path / "other", [make("rtn()", suite="prune")]).results
    assert run(results, other) == 2
    assert "have no row in common: there is quant, quick tier, model tiny in one and prune" in capsys.readouterr().err


# ---- false alarms -------------------------------------------------------------------------------


def measure_nothing(rng, recipe, items):
    """A record of a row that is what it was: other noise, the same truth."""
    load = np.exp(rng.normal(0, 0.2, 10))
    ours, theirs = (load * np.exp(rng.normal(0, 0.05, 10)) for _ in range(2))
    nll = items + rng.normal(0, 0.05, items.size)
    right = np.where(rng.random(items.size) < 0.2, 1 - (items > 2), items > 2).astype(int)
    return make(
        recipe,
        samples={
            "token_ppl_window_nll": nll.tolist(),
            "recall_acc": right.tolist(),
            f"decode_seconds_{POINT}": ours.tolist(),
            f"decode_reference_seconds_{POINT}": theirs.tolist(),
            "fit_step_ms": np.exp(rng.normal(3, 0.05, 10)).tolist(),
        },
        metrics={
            "token_ppl": Metric(math.exp(nll.mean())),
            "recall_acc": Metric(float(right.mean())),
            f"decode_speedup_{POINT}": Metric(1.0),
            "fit_step_ms": Metric(20.0),
            "stored_bytes": Metric(1e6),
        },
    )


def test_two_tables_of_the_same_give_no_verdict_at_the_nominal_rate():
    """However small a difference may be: with Holm over the tables one in twenty has any verdict, at most."""
    rng, runs, alarms = np.random.default_rng(5), 100, 0
    items = rng.normal(2.0, 0.4, 60)
    for _ in range(runs):
        sides = [
            Tables("", (Table(tuple(Row((measure_nothing(rng, name, items),)) for name in ("a()", "b()", "c()"))),))
            for _ in range(2)
        ]
        comparison = compare_tables(sides[0], sides[1], Effects(0.0, 0.0))
        assert comparison.compared == 3 and len(comparison.findings) == 12
        alarms += any(one.verdict != "indistinguishable" for one in comparison.findings)
    assert stats.binomtest(alarms, runs, 0.05, alternative="greater").pvalue > 0.01


@pytest.mark.skipif(PUBLISHED is None or not PUBLISHED.is_dir(), reason="nothing published here")
def test_published_seeds_of_a_row_are_as_fast_as_each_other():
    """Records of one row at two seeds time the same work in two processes: real noise, and no difference."""
    p = []
    for table in group_records(load(PUBLISHED, "quant")):
        for row in table.rows:
            if row.worst.outcome == "ok" and not row.simulated and len(row.records) > 1:
                sides = [Row((record,)) for record in row.records[:2]]
                p += [
                    change.test.p
                    for change in find_changes(*sides).found
                    if change.metric.startswith("prefill_speedup")
                ]
    assert len(p) >= 20
    assert stats.binomtest(sum(one <= 0.05 for one in p), len(p), 0.05, alternative="greater").pvalue > 0.01
