"""`effbench compare`: two rows item by item, whichever of them is named first. Ratios: `test_changes.py`."""

import dataclasses
import math
import re
from decimal import Decimal, localcontext

import numpy as np
import pytest
from fake_records import failed, make, store_records
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from effbench.cli.main import main
from effbench.core.errors import Usage
from effbench.core.paths import PUBLISHED
from effbench.records.record import Metric
from effbench.records.store import Store
from effbench.report.changes import compare_metrics
from effbench.report.compare import compare_rows, find_pair, write_comparison
from effbench.report.differences import compute_row_tests, estimate_difference
from effbench.report.groups import Row, group_records
from effbench.report.metrics import get_family, get_scale, select_quality
from effbench.report.pages import load
from effbench.report.sides import Where, open_sides
from effbench.report.verdicts import Effects
from effbench.stats.paired import mcnemar, score_interval


@pytest.fixture
def results(tmp_path):
    return store_records(tmp_path / "results").results


def compare(before, after):
    return write_comparison(before, after, compare_rows(before, after), Effects())


def find_rows(names, results):
    with open_sides(names, Where(str(results))) as sides:
        return find_pair(sides)


def run(results, *words):
    return main(["compare", *words, f"results={results}"])


def cells(text):
    """Lines of the table by metric, cells by header."""
    header, _, *lines = (
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.split("\n\n")[1].splitlines()
    )
    return {line[0]: dict(zip(header, line, strict=True)) for line in lines}


def test_recipes_by_name(results, capsys):
    assert run(results, "baseline", "rtn(bits=2)", "suite=quant") == 0
    table = cells(capsys.readouterr().out)
    ppl = table["token_ppl"]
    assert float(ppl["B - A"]) == pytest.approx(float(ppl["B"]) - float(ppl["A"]), abs=0.011)
    assert re.fullmatch(r"\+15\.\d+ to \+15\.\d+", ppl["95 % interval"]) and ppl["p (Holm)"].endswith("*")
    recall = table["recall_acc"]
    assert (
        recall["lost, gained"] == "40, 0" and recall["B - A"].startswith("-33.3") and recall["p (Holm)"].endswith("*")
    )


def learned(recipe, right, losses, acceptance):
    """A record of a task that was learned: right and wrong answers, their losses, and the gap to a teacher."""
    metrics = {
        "completion_exact": Metric(float(np.mean(right)), n=len(right)),
        "completion_nll": Metric(float(np.mean(losses)), n=len(losses)),
        "acceptance": Metric(float(np.mean(acceptance)), n=len(acceptance)),
    }
    samples = {"completion_exact": right, "completion_nll": losses, "acceptance": acceptance}
    return make(recipe, metrics=metrics, samples=samples, protocols={})


def test_what_was_learned_is_compared_answer_by_answer():
    rng = np.random.default_rng(3)
    right = [1.0] * 30 + [0.0] * 30
    losses, acceptance = rng.normal(1.0, 0.3, 60), rng.uniform(0.4, 0.6, 40)
    worse = learned("ia3()", right, losses.tolist(), acceptance.tolist())
    fewer = [1.0] * 18 + [0.0] * 12 + [0.0] * 28 + [1.0] * 2
    better = learned("lora()", fewer, (losses - 0.2).tolist(), (acceptance + 0.1).tolist())
    changes = {change.metric: change for change in compare_metrics([worse], [better])}
    exact = changes.pop("completion_exact")
    assert exact.test.p == mcnemar(12, 2) and exact.value == pytest.approx(-100 / 6)
    assert (exact.low, exact.high) == pytest.approx([100 * bound for bound in score_interval(12, 2, 60)])
    assert {name: round(change.value, 6) for name, change in changes.items()} == {
        "completion_nll": -0.2,
        "acceptance": 10.0,
    }
    assert re.search(r"completion_exact .*\| +12, 2 \|", compare(Row((worse,)), Row((better,))))


def test_the_interval_of_a_ratio_of_sums_is_its_own():
    """Texts of unlike length whose words are all alike: by length alone nothing is uncertain."""
    rng = np.random.default_rng(8)
    words = rng.integers(10, 500, 60).astype(float)

    def build(recipe, each, noise):
        pairs = [[-float(n * each + d), float(n)] for n, d in zip(words, noise, strict=True)]
        return make(recipe, metrics={"x_word_ppl": Metric(1.0)}, samples={"x_word_ppl": pairs}, protocols={})

    noise = rng.normal(0, 1, 60)
    before, after = build("baseline", 3.0, np.zeros(60)), build("rtn(bits=4)", 3.1, noise)
    test = estimate_difference([before], [after], "x_word_ppl")
    assert test.value == pytest.approx(0.1 + noise.sum() / words.sum())
    residual = noise - noise.sum() / words.sum() * words  # of the ratio, by the delta method
    error = math.sqrt(residual @ residual / 59 / 60) / words.mean()
    assert test.high - test.value == pytest.approx(2.001 * error, rel=1e-3)


def test_a_file_with_itself(results, capsys):
    path = next((results / "records").rglob("rtn_bits_8*.json"))
    assert main(["compare", str(path), str(path)]) == 0
    assert " *" not in capsys.readouterr().out.split("Paired")[0]


def seeds(recipe, answers):
    """A row whose seeds answered as given, a list of zeros and ones for each."""
    return Row(
        tuple(
            make(recipe, seed, metrics={"recall_acc": Metric(float(np.mean(one)))}, samples={"recall_acc": list(one)})
            for seed, one in enumerate(answers)
        )
    )


answers = st.integers(5, 40).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1, max_size=3) for _ in range(2))
    )
)


@settings(max_examples=60, deadline=None)
@given(answers)
def test_the_order_of_the_sides_changes_the_sign_and_nothing_else(sides):
    """However many seeds each side has, B - A is the difference of the columns and has one p."""
    before, after = (seeds(name, side) for name, side in zip(("a()", "b()"), sides, strict=True))
    (there,), (back,) = (
        list(compare_metrics(one.records, other.records)) for one, other in ((before, after), (after, before))
    )
    assert back.value == pytest.approx(-there.value, abs=1e-12) and back.test.p == there.test.p
    if there.low is None:  # items that all are one apart have no spread
        gaps = np.mean(sides[1], axis=0) - np.mean(sides[0], axis=0)
        assert np.ptp(gaps) < 1e-12 and back.low is back.high is there.high is None
    else:
        assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-9)
    assert there.before == pytest.approx(100 * before.estimate("recall_acc").value)
    assert there.after == pytest.approx(100 * after.estimate("recall_acc").value)
    assert there.value == pytest.approx(100 * there.test.value, abs=1e-9)


def read_difference(line):
    """What a line of the table prints: A, B, B - A, and the bounds of the interval."""
    bounds = line["95 % interval"].split(" to ")
    return [Decimal(line[name]) for name in ("A", "B", "B - A")] + [Decimal(bound) for bound in bounds if bound != "–"]


@settings(max_examples=15, deadline=None)
@given(answers, st.floats(-30, 90), st.integers(5, 40))
def test_what_is_printed_adds_up_either_way_round(sides, worse, windows):
    """B - A is the difference of the columns to the last digit; the other order changes signs and swaps bounds."""
    rows = []
    for name, side, more in zip(("a()", "b()"), sides, (0.0, worse), strict=True):
        nll = [40 + more + i % 7 / 10 * (more or 1) for i in range(windows)]
        ppl = {"token_ppl": Metric(math.exp(np.mean(nll)))}
        records = [
            dataclasses.replace(one, metrics=one.metrics | ppl, samples=one.samples | {"token_ppl_window_nll": nll})
            for one in seeds(name, side).records
        ]
        rows.append(Row(tuple(records)))
    there, back = (cells(compare(*pair)) for pair in (rows, rows[::-1]))
    assert list(there) == list(back) == ["token_ppl", "recall_acc"]
    for metric, line in there.items():
        a, b, change, *bounds = read_difference(line)
        assert b.as_tuple().exponent == change.as_tuple().exponent
        with localcontext(prec=400):
            assert change == b - a
            assert read_difference(back[metric]) == [b, a, -change, *(-bound for bound in bounds[::-1])]
        assert line["p"] == back[metric]["p"] and line["p (Holm)"] == back[metric]["p (Holm)"]
        if metric == "recall_acc":
            assert all(-100 <= bound <= 100 for bound in bounds)


def test_no_difference_of_accuracies_is_above_a_hundred():
    """Of five answers four changed: Student's interval and the bootstrap's would both reach beyond."""
    before, after = seeds("a()", [[1] * 5, [1] * 5]), seeds("b()", [[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]])
    (change,) = compare_metrics(before.records, after.records)
    assert change.low == -100 and change.high < 0


@pytest.mark.parametrize("metric", ["token_ppl", "kl_nats_per_token"])
@pytest.mark.parametrize("windows", [5, 16, 29, 60])
def test_windows_are_paired_and_tested_by_student(metric, windows):
    """However few of them; what scipy says of the same differences."""
    left, right = np.random.default_rng(3).normal(2.0, 0.4, (2, windows))
    name = "token_ppl_window_nll" if metric == "token_ppl" else metric
    sides = [
        [make(recipe, metrics={metric: Metric(2.0)}, samples={name: values.tolist()})]
        for recipe, values in (("a()", left), ("b()", right))
    ]
    theirs = ttest_rel(right, left)
    found = estimate_difference(*sides, metric)
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))
    if metric == "token_ppl":
        (table,) = group_records([make(samples={name: left.tolist()}), make("b()", samples={name: right.tolist()})])
        assert compute_row_tests(table)["b()"][metric].p == pytest.approx(theirs.pvalue)


def test_a_row_without_seeds_meets_all_seeds_of_the_other():
    """The mean over the seeds, and not the first of them alone."""
    one, three = seeds("a()", [[1] * 40]), seeds("b()", [[1] * 40, [0] * 40, [0] * 40])
    (change,) = compare_metrics(one.records, three.records)
    assert change.value == pytest.approx(-200 / 3) and change.test.p < 1e-6
    (change,) = compare_metrics(three.records, one.records)
    assert change.value == pytest.approx(200 / 3) and change.test.p < 1e-6


def test_perplexity_and_its_interval_change_sign_too():
    before, after = make(), make("gptq(bits=4)", 0, worse=0.1, bits=4.25, rng_seed=1)
    there, back = (next(compare_metrics([a], [b])) for a, b in ((before, after), (after, before)))
    assert there.metric == "token_ppl"
    assert there.before == pytest.approx(before.metrics["token_ppl"].value)
    assert there.after == pytest.approx(after.metrics["token_ppl"].value)
    assert there.low < there.value < there.high
    assert (back.low, back.value, back.high) == pytest.approx((-there.high, -there.value, -there.low))


@pytest.mark.skipif(PUBLISHED is None or not PUBLISHED.is_dir(), reason="nothing published here")
@pytest.mark.parametrize("suite", ["quant", "prune"])
def test_columns_are_the_published_numbers(suite):
    """A and B are means of items, and those are what the records say; of logarithms for perplexities."""
    table = group_records(load(PUBLISHED, suite))[0]
    for row in table.rows[1:]:
        changes = {change.metric: change for change in compare_metrics(table.baseline.records, row.records)}
        assert changes.keys() == set(select_quality(row.records[0].metrics)), row.recipe
        for metric, change in changes.items():
            values = [record.metrics[metric].value for record in row.records]
            mean = (
                math.exp(np.mean(np.log(values)))
                if get_family(metric) == "perplexity"
                else np.mean(values) * get_scale(metric)
            )
            assert change.after == pytest.approx(mean, rel=1e-6, abs=1e-9), (row.recipe, metric)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocols": {"token_ppl": "p64"}}, "token_ppl was measured as .*window512.* and as 'p64'"),
        ({"model": "other"}, "model is tiny for one and other for the other"),
        ({"digests": {"model": "m1", "data": "d2", "tasks": "t1"}}, "the data digest is d1 for one and d2"),
        ({"samples": {}, "metrics": {}}, "no metric of both can be compared"),
    ],
)
def test_what_was_measured_differently_is_refused(change, message):
    rows = [Row((record,)) for record in (make(), make("rtn(bits=4)", **change))]
    with pytest.raises(Usage, match=message) as caught:
        compare(*rows)
    assert "\n" not in str(caught.value)


def test_a_perplexity_beyond_all_numbers_is_left_out():
    worse = dataclasses.replace(make("rtn()"), samples={"token_ppl_window_nll": [800.0] * 60, "recall_acc": [1] * 120})
    assert [change.metric for change in compare_metrics([make()], [worse])] == ["tasks_acc", "recall_acc"]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("baseline", "rtn(bits=9)", "did you mean 'rtn"),
        ("rtn(bits=2)", "rtn(bits=3)", "token_ppl was measured as"),
        (
            "baseline",
            "squeezellm(bits=3)",
            "(bits=3) has quant v1, quick tier, model tiny: oom (needs 9 GiB)",
        ),
        ("", "baseline", "neither a record file nor a recipe"),
        ("baseline", "a\0b", "neither a record file nor a recipe"),
        ("baseline", "x" * 5000, "neither a record file nor a recipe"),
        ("/etc", "baseline", "neither a record file nor a recipe"),
        ("baseline", __file__, "not JSON"),
    ],
)
def test_wrong_names_cost_one_line(results, capsys, a, b, message):
    Store(results).write(make("rtn(bits=3)", tier="full", protocols={"token_ppl": "whole"}))
    assert run(results, a, b) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and len(err) < 1500


def test_many_names_are_not_listed(results, capsys):
    for bits in range(100, 140):
        Store(results).write(make(f"rtn(bits={bits})"))
    assert run(results, "baseline", "qqq") == 2
    assert "`effbench report` shows the recipes that have records" in capsys.readouterr().err


def test_rows_of_a_file_and_of_a_name(results):
    path = next((results / "records").rglob("gptq*s1*.json"))
    before, after = find_rows(("baseline", str(path)), results)
    assert before.is_baseline and [record.cell.seed for record in after.records] == [1]


def test_columns_show_a_difference_smaller_than_its_interval():
    before, after = make(), make("gptq(bits=4)", 0, worse=0.0006, bits=4.25, rng_seed=1)
    row = next(line for line in compare(Row((before,)), Row((after,))).splitlines() if "token_ppl" in line)
    a, b, change = (float(cell) for cell in row.split("|")[2:5])
    assert a != b and change == pytest.approx(b - a, abs=1.1e-2 * abs(change))


def test_of_several_records_of_a_name_those_that_can_be_compared_are_taken(tmp_path):
    """The first table has a row that failed, the second one metric, the third all."""
    store = Store(tmp_path)
    for version, outcome, kept in ((3, "unsupported", 0), (2, "ok", 1), (1, "ok", 9)):
        for recipe in ("rtn()", "gptq()"):
            whole = make(recipe, worse=0.1, suite_version=version)
            store.write(
                dataclasses.replace(
                    whole,
                    outcome=outcome if recipe == "gptq()" else "ok",
                    reason="no such layer" if outcome != "ok" else "",
                    samples=dict(list(whole.samples.items())[:kept]),
                )
            )
    for names in (("rtn()", "gptq()"), ("gptq()", "rtn()")):
        rows = find_rows(names, tmp_path)
        assert [row.records[0].cell.suite_version for row in rows] == [1, 1]
        assert [row.worst.outcome for row in rows] == ["ok", "ok"]
        assert "recall_acc" in compare(*rows)


def test_equal_settings_count_more_than_metrics_and_others_are_named(tmp_path):
    store, other = Store(tmp_path), {"threads": 2, "dtype": "float32"}
    one = make("rtn()", worse=0.1)
    store.write(dataclasses.replace(one, samples={"token_ppl_window_nll": one.samples["token_ppl_window_nll"]}))
    store.write(make("rtn()", settings=other))
    store.write(make("gptq()"))
    before, after = find_rows(("rtn()", "gptq()"), tmp_path)
    assert before.records[0].cell.settings == after.records[0].cell.settings
    assert "Settings of A and B differ" not in compare(before, after)
    store.write(make("wanda()", settings=other | {"limit": 5}))
    text = compare(*find_rows(("gptq()", "wanda()"), tmp_path))
    assert "Settings of A and B differ: limit None and 5, threads 1 and 2\n" in text


def test_where_no_pair_can_be_compared_all_are_told_with_the_mend(tmp_path, capsys):
    for version in (1, 2):
        Store(tmp_path).write(make("rtn()", suite_version=version, samples={}, metrics={}))
    Store(tmp_path).write(failed("gptq()", suite_version=1, outcome="unsupported", reason="no such layer"))
    Store(tmp_path).write(make("gptq()", suite_version=2))
    assert main(["compare", "rtn()", "gptq()", f"results={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "rtn() and gptq() cannot be compared: no metric of both can be compared. " in err
    assert "quant v1, quick tier, model tiny: no results per item" in err and "quant v2, quick tier" in err
    assert (
        "v2, quick tier, model tiny: token_ppl, " in err and "v1, quick tier, model tiny: unsupported (no such" in err
    )
    assert "Mend: measure both in one `effbench run suite=quant`" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: a, b (to compare two rows, folders or git revisions,"),
        (["rtn()"], "required: b (to compare two rows, folders or git revisions,"),
        (["rtn()", "suite=quant"], "'suite=quant' is an option: two names are needed before it"),
        (["results=results", "rtn()"], "'results=results' is an option: two names are needed"),
    ],
)
def test_one_row_alone_is_not_enough(words, message, capsys):
    assert main(["compare", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "key=value" not in err and err.count("\n") == 1


@pytest.mark.parametrize("windows", [2, 3, 4])
def test_few_windows_have_an_interval_and_the_p_of_a_paired_t(windows):
    sides = [[2.3 + 0.1 * i + more * (1 + 0.2 * i) for i in range(windows)] for more in (0.0, 0.05)]
    rows = [
        Row((make(name, metrics={"token_ppl": Metric(math.exp(np.mean(nll)))}, samples={"token_ppl_window_nll": nll}),))
        for name, nll in zip(("a()", "b()"), sides, strict=True)
    ]
    line = cells(compare(*rows))["token_ppl"]
    assert line["n"] == str(windows) and line["95 % interval"] != "–"
    assert float(line["p"]) == pytest.approx(ttest_rel(*sides).pvalue, rel=0.1)


def test_one_window_has_neither():
    rows = [
        Row((make(name, metrics={"token_ppl": Metric(9.0)}, samples={"token_ppl_window_nll": [nll]}),))
        for name, nll in (("a()", 2.3), ("b()", 2.4))
    ]
    line = cells(compare(*rows))["token_ppl"]
    assert line["p"] == "1" and line["95 % interval"] == "–"
