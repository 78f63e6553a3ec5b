"""Equal sides made of records: they are equal, tests keep to their level, and one that does not is caught."""

import numpy as np
import pytest
from fake_records import make
from scipy.stats import binomtest

from effbench.core.paths import CHECKOUT, PUBLISHED
from effbench.records.record import Metric
from effbench.report import differences
from effbench.report.alarms import Count, count_alarms, count_tables, recentre, swap, write_page
from effbench.report.differences import read_items
from effbench.report.groups import group_records

WINDOWS, QUESTIONS = 40, 60


def measure(recipe, seed, worse):
    """A record of windows, of questions, and of texts of unlike size."""
    rng = np.random.default_rng(seed)
    nll = np.random.default_rng(1).normal(2, 0.3, WINDOWS) + worse * rng.random(WINDOWS)
    right = (rng.random(QUESTIONS) < 0.7 - worse / 10).astype(float)
    words = np.random.default_rng(2).integers(20, 200, WINDOWS)
    texts = [[-float(n * (3 + worse * rng.random())), float(n)] for n in words]
    metrics = {
        "token_ppl": Metric(float(np.exp(nll.mean()))),
        "recall_acc": Metric(float(right.mean())),
        "tasks_acc": Metric(float(right.mean())),
        "texts_word_ppl": Metric(20.0),
    }
    samples = {"token_ppl_window_nll": nll.tolist(), "recall_acc": right.tolist(), "texts_word_ppl": texts}
    return make(recipe, metrics=metrics, samples=samples, protocols={})


RECORDS = [measure("baseline", 0, 0.0), *(measure(f"rtn(bits={bits})", bits, 2.0 / bits) for bits in (2, 3, 4))]


def test_sides_that_were_exchanged_hold_what_they_held():
    rng, (before, after) = np.random.default_rng(0), RECORDS[:2]
    left, right = swap(before, after, ["token_ppl", "texts_word_ppl"], rng)
    for name in ("token_ppl_window_nll", "texts_word_ppl"):
        given = zip(before.samples[name], after.samples[name], strict=True)
        made = list(zip(left.samples[name], right.samples[name], strict=True))
        turned = [pair[::-1] == other for pair, other in zip(given, made, strict=True)]
        assert 0.2 < np.mean(turned) < 0.8
        assert all(
            sorted(a) == sorted(b)
            for a, b in zip(zip(before.samples[name], after.samples[name], strict=True), made, strict=True)
        )


def test_sides_with_gaps_drawn_anew_have_one_mean():
    rng, (before, after) = np.random.default_rng(0), RECORDS[:2]
    means = []
    for _ in range(400):
        left, right = recentre(before, after, ["token_ppl"], rng)
        means.append(np.mean(read_items(right, "token_ppl") - read_items(left, "token_ppl")))
    assert np.mean(means) == pytest.approx(0, abs=4 * np.std(means) / 20) and np.std(means) > 0


def test_tests_keep_to_their_level_on_equal_sides():
    tables = group_records(RECORDS)
    counts = count_alarms(tables, comparisons=600)
    assert {family: count.made for family, count in counts.items()} == {"perplexity": 300, "accuracy": 300}
    assert min(count.p for count in counts.values()) > 0.01
    assert count_tables(tables, draws=60).alarms <= 8


def test_a_test_that_is_too_sure_is_caught(monkeypatch):
    """Windows taken for nine times as many."""
    honest = differences.mean_interval
    monkeypatch.setattr(
        differences, "mean_interval", lambda *strata, **how: honest(*(np.tile(s, 9) for s in strata), **how)
    )
    tables = group_records(RECORDS)
    assert count_alarms(tables, comparisons=200)["perplexity"].p < 1e-6
    assert count_tables(tables, draws=30).p < 1e-6


def test_a_table_without_correction_is_caught(monkeypatch):
    monkeypatch.setattr(differences, "holm", lambda p: list(p))
    records = [RECORDS[0], *(measure(f"rtn(bits={n})", n, 0.1) for n in range(2, 12))]
    assert count_tables(group_records(records), draws=60).p < 1e-3


def test_the_rate_is_judged_by_the_binomial():
    assert Count(1000, 63).p == binomtest(63, 1000, 0.05, alternative="greater").pvalue < 0.05
    assert Count(1000, 40).p > 0.5 and Count().p == 1


def test_nothing_to_compare():
    assert count_alarms(group_records([make()])) == {} and count_tables(group_records([make()])).made == 0


@pytest.mark.skipif(PUBLISHED is None or CHECKOUT is None, reason="nothing published here")
def test_the_page_is_of_the_published_records():
    page = (CHECKOUT / "docs" / "false-alarms.md").read_text()
    together = next(line for line in page.splitlines() if line.startswith("| together"))
    made, alarms = (int(cell) for cell in together.split("|")[2:4])
    assert made == 1000 and Count(made, alarms).p > 0.05


def test_a_page_is_kept_as_long_as_it_is_of_these_records():
    text = write_page(group_records(RECORDS), "of others")
    assert write_page(group_records(RECORDS), f"{text}kept").endswith("kept")
    assert write_page(group_records(RECORDS[:-1]), text).partition("\n")[0] != text.partition("\n")[0]
