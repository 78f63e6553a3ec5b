"""Own rows beside published ones: what reproduces, what differs, and what cannot be compared."""

import dataclasses

import pytest
from fake_records import RECORDS, failed, make, store_records

from effbench.cli.main import main
from effbench.records.record import Metric
from effbench.records.store import Store
from effbench.report import published
from effbench.report.groups import Row, group_records
from effbench.report.published import compare_with_published, judge, make_published_sheets


def timed(recipe="baseline", speed=100.0, **changes):
    record = make(recipe, **changes)
    speeds = {f"{phase}_tok_per_s_b1_c128": Metric(speed) for phase in ("prefill", "decode")}
    return dataclasses.replace(record, metrics=record.metrics | speeds)


@pytest.fixture
def store(tmp_path):
    return store_records(tmp_path / "published")


def verdict(own, other, **options):
    return judge(Row(tuple(own)), Row(tuple(other)), **options)


def test_the_same_numbers_reproduce(store):
    text = compare_with_published(RECORDS, store)
    assert text == (
        "quant v1, quick tier, model tiny: 6 of 6 rows reproduce the published quality (largest difference 0 %); "
        "published on acme-cpu-2core."
    )


@pytest.mark.parametrize(
    ("metric", "factor", "reproduces"),
    [
        ("token_ppl", 1.0009, True),
        ("token_ppl", 1.0011, False),
        ("recall_acc", 1 + 0.0009 / 0.8333, True),
        ("recall_acc", 1 + 0.0011 / 0.8333, False),
        ("bits_per_weight", 1.002, False),
        ("stored_bytes", 0.9999, True),
    ],
)
def test_the_tolerance_is_a_thousandth(metric, factor, reproduces):
    """Without items there is no interval, and the tolerance alone decides."""
    other = make("rtn(bits=4)", samples={})
    changed = Metric(other.metrics[metric].value * factor)
    own = dataclasses.replace(other, metrics=other.metrics | {metric: changed})
    judged = verdict([own], [other])
    assert judged.reproduces == reproduces
    assert [difference.metric for difference in judged.differences] == ([] if reproduces else [metric])


def test_a_difference_that_the_items_do_not_bear_out_reproduces():
    other = make("rtn(bits=4)", wrong=10)
    assert verdict([make("rtn(bits=4)", wrong=11)], [other]).reproduces  # 0.8 points, one answer of 120
    judged = verdict([make("rtn(bits=4)", wrong=30)], [other])
    assert {difference.metric for difference in judged.differences} == {"recall_acc", "tasks_acc"}
    assert "recall, % 58.33 here, 75.00 published (95 % interval of the difference -2" in str(judged)


def test_every_difference_of_perplexity_is_named_with_its_interval():
    judged = verdict(
        [make("rtn(bits=4)", worse=0.05, bits=4.0, rng_seed=3)], [make("rtn(bits=4)", bits=4.0, rng_seed=4)]
    )
    assert "perplexity" in str(judged) and "+5." in str(judged).partition("interval of the difference ")[2]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"suite_version": 2}, "version 2 of the suite here, 1 published"),
        ({"data": "text:a"}, "data text:a here, tiny published"),
        ({"digests": {"model": "m2", "data": "d1", "tasks": "t1"}}, "the content of the model is not the same"),
        ({"resolved": ({"method": "rtn"},)}, "other defaults"),
        ({"settings": {"threads": 1, "dtype": "float32", "limit": 10}}, "limit 10 here, default published"),
        ({"settings": {"threads": 1, "dtype": "bfloat16"}}, "dtype bfloat16 here, float32 published"),
        ({"protocols": {"token_ppl": "p64"}}, "perplexity is measured by another protocol"),
        ({"metrics": {"apply_seconds": Metric(1.0)}}, "no metric of quality in common"),
        ({"seed": 7}, "no seed in common"),
    ],
)
def test_what_was_not_measured_alike_is_not_compared(change, why):
    judged = verdict([make("rtn(bits=4)", **change)], [make("rtn(bits=4)")])
    assert not judged.comparable and not judged.reproduces and str(judged) == f"not comparable: {judged.why}"
    assert why in judged.why


@pytest.mark.parametrize(
    "place",
    [{"threads": 8}, {"machine": "other"}, {"device": "cuda"}, {"probes": ["quality"]}, {"energy_seconds": 9.0}],
)
def test_the_place_does_not_keep_quality_from_being_compared(place):
    own = make("rtn(bits=4)", settings={"threads": 1, "dtype": "float32"} | place)
    assert verdict([own], [make("rtn(bits=4)")]).reproduces


def test_only_common_seeds_are_compared():
    other = [make("gptq()", seed, worse=0.1 * seed) for seed in range(3)]
    assert verdict(other[2:], other).reproduces and verdict(other, other[:1]).reproduces


def test_another_outcome_differs():
    judged = verdict([failed("rtn(bits=4)")], [make("rtn(bits=4)")])
    assert str(judged) == "differs: oom here, ok published"
    assert verdict([failed("rtn(bits=4)")], [failed("rtn(bits=4)")]).reproduces


def test_speed_is_a_ratio_where_it_was_timed_alike():
    assert verdict([timed(speed=50.0)], [timed()]).speed("decode") == 0.5
    other = timed(settings={"threads": 1, "dtype": "float32", "speed_new_tokens": 16})
    judged = verdict([other], [timed()])
    assert judged.reproduces and judged.speed("decode") is None
    assert verdict([timed(simulated=True)], [timed()]).speed("decode") is None


def test_the_summary_counts_and_names(store):
    own = [
        timed(),
        make("rtn(bits=2)", worse=0.5, wrong=40, bits=2.25, rng_seed=2),
        make("rtn(bits=8)", bits=8.25, rng_seed=3, protocols={"token_ppl": "other"}),
        make("mine()", worse=0.1),
    ]
    store.write(timed(attempt=2))
    lines = compare_with_published(own, store, stale=lambda record: record.cell.recipe == "baseline").splitlines()
    assert lines[0].startswith("  rtn(bits=2) differs: perplexity ")
    assert lines[1] == "  rtn(bits=8) not comparable: perplexity is measured by another protocol"
    assert lines[2].startswith("quant v1, quick tier, model tiny: 1 of 4 rows reproduce the published quality")
    for words in (
        "1 differ, 1 not comparable, 1 not published",
        "decode runs at 1.0×",
        "1 row published from an older source",
    ):
        assert words in lines[2]
    assert len(lines) == 3


def test_a_reason_that_all_rows_share_is_said_once(store):
    """Rows that are not published do not hide it; a row with another reason, or that differs, does."""
    other = {"threads": 1, "dtype": "bfloat16"}
    own = [make(settings=other), make("rtn(bits=2)", settings=other), make("rtn(bits=8)", settings=other)]
    name, why = "quant v1, quick tier, model tiny", "dtype bfloat16 here, float32 published"
    assert (
        compare_with_published(own, store) == f"{name}: 3 rows cannot be compared with the published quality ({why})."
    )
    text = compare_with_published([*own, make("mine()", settings=other)], store)
    assert text == f"{name}: 3 rows cannot be compared with the published quality ({why}), 1 not published."
    assert f"{name}: 1 row cannot be compared with" in compare_with_published(own[:1], store)
    apart = make("rtn(bits=8)", settings=other, resolved=({"method": "rtn"},))
    lines = compare_with_published([*own[:2], apart], store).splitlines()
    assert why in lines[0] and why in lines[1] and "other defaults" in lines[2] and "3 not comparable" in lines[3]
    (sheet,) = make_published_sheets(own, store)
    assert sheet.notes == () and why in sheet.legend


def test_nothing_published_is_one_line(tmp_path, monkeypatch):
    nothing = "quant v1, quick tier, model tiny: nothing is published to compare with."
    assert compare_with_published(RECORDS, Store(tmp_path)) == nothing
    monkeypatch.setattr(published, "PUBLISHED", None)  # an installed package
    assert compare_with_published(RECORDS) == nothing


def test_the_published_numbers_come_from_the_checkout_by_default(store, monkeypatch):
    monkeypatch.setattr(published, "PUBLISHED", store.results)
    assert "6 of 6 rows reproduce" in compare_with_published(RECORDS)


def test_a_host_of_its_own_and_settings_of_another_tier_do_not_hide_the_row(store):
    """Of several published rows the one that was measured alike is compared."""
    for record in RECORDS:
        store.write(dataclasses.replace(record, cell=dataclasses.replace(record.cell, settings={"limit": 5})))
    assert "6 of 6 rows reproduce" in compare_with_published(RECORDS, store)


def test_the_report_sets_both_side_by_side(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "PUBLISHED", store.results)
    own = Store(tmp_path / "runs")
    for record in (make(), make("rtn(bits=2)", worse=0.5, wrong=40, bits=2.25, rng_seed=2), make("mine()")):
        own.write(record)
    assert main(["report", f"results={own.results}", "--published", "format=md"]) == 0
    text = capsys.readouterr().out
    table = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table]
    assert {line[0]: line[1] for line in lines} == {
        "recipe": "quality", "baseline": "reproduces", "mine()": "not published", "rtn(bits=2)": "differs",
    }  # fmt: skip
    assert "rtn(bits=2) differs: perplexity" in text and "1 of 3 rows reproduce" in text
    (sheet,) = make_published_sheets(group_records([make()])[0].records)
    assert sheet.grids[0].rows[0][:2] == ("baseline", "reproduces")
