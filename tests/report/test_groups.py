"""What shares a table, under which name, and how long sorting takes."""

import dataclasses
import random

import pytest
from fake_records import failed, make
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.report.groups import group_records
from effbench.report.pages import render
from effbench.report.sheets import make_sheets


def on(host, recipe="baseline", **changes):
    return make(recipe, environment={"machine": "acme-cpu-2core", "host": host}, **changes)


def test_two_hosts_never_share_a_table():
    """They may be of one kind of machine: a table of theirs would put speeds of both into one column."""
    records = [on("aa"), on("aa", "rtn(bits=4)"), on("bb"), on("bb", "rtn(bits=4)"), on("bb", "rtn(bits=8)")]
    tables = group_records(records)
    assert [(table.host, len(table.rows)) for table in tables] == [("aa", 2), ("bb", 3)]
    assert all({record.environment["host"] for record in table.records} == {table.host} for table in tables)


def test_a_record_of_a_worker_that_died_early_joins_its_kind():
    dead = failed("rtn(bits=4)", outcome="crashed", reason="killed by signal 9", environment={})
    (table,) = group_records([on("aa"), dead])
    assert table.host == "aa" and table.rows[1].records == (dead,)


places = st.fixed_dictionaries(
    {
        "suite_version": st.integers(1, 2),
        "tier": st.sampled_from(["quick", "full"]),
        "model": st.sampled_from(["tiny", "org/model"]),
        "data": st.sampled_from(["tiny", "text:a"]),
        "settings": st.fixed_dictionaries(
            {"threads": st.integers(1, 2), "machine": st.just("m")},
            optional={"limit": st.integers(10, 11), "speed_points": st.just([[1, 128]]), "window": st.none()},
        ),
        "host": st.sampled_from(["", "aa", "bb"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(places, min_size=1, max_size=8))
def test_no_two_tables_of_a_page_have_one_title(several):
    records = []
    for place in several:
        host = place.pop("host")
        records.append(make(environment={"machine": "m", "host": host}, **place))
    sheets = make_sheets(group_records(records))
    assert len({sheet.title for sheet in sheets}) == len(sheets)


def test_a_caption_has_every_setting_in_which_tables_of_the_page_differ():
    plain = {"threads": 1, "dtype": "float32", "speed_points": [[1, 128]]}
    records = [make(settings=plain), make(settings=plain | {"speed_new_tokens": 16, "speed_points": [[8, 128]]})]
    first, second = make_sheets(group_records(records))
    assert {first.title, second.title} == {
        "quant v1, quick tier, model tiny, speed_new_tokens default, speed_points [[1, 128]]",
        "quant v1, quick tier, model tiny, speed_new_tokens 16, speed_points [[8, 128]]",
    }
    for sheet in (first, second):
        assert sheet.title.partition("tiny, ")[2] in sheet.caption
    (alone,) = make_sheets(group_records(records[:1]))
    assert alone.title == "quant v1, quick tier, model tiny" and "speed_points" not in alone.caption


def test_a_caption_says_at_which_commits_and_how_many_rows_are_older():
    def at(commit, day, recipe="baseline", dirty=False):
        environment = {"machine": "m", "commit": commit * 40, "dirty": dirty}
        return make(recipe, environment=environment, started=f"2026-01-0{day}T00:00:00+00:00")

    records = [at("b", 1), at("a", 2, "rtn(bits=4)"), at("a", 3, "rtn(bits=8)", dirty=True)]
    (sheet,) = make_sheets(group_records(records))
    assert "Measured at commits bbbbbbbbb, aaaaaaaaa with changes." in sheet.caption
    assert "older source" not in sheet.caption
    (sheet,) = make_sheets(group_records(records), stale=lambda record: record.environment["commit"][0] == "a")
    assert "2 of 3 rows were measured by an older source, model or data." in sheet.caption
    assert "2 of 3 rows were measured by an older source, model or data." in render(
        records, "quant", stale=lambda record: record.environment["commit"][0] == "a"
    )


def test_a_caption_tells_which_operation_each_backend_computed():
    ran = {"int_linear": {"triton": 3, "reference": 1}, "fp8_product": {"reference": 8}}
    records = [make(kernels=ran), make("a()", kernels={"kv_attend": {"reference": 2}}), make("b()")]
    (sheet,) = make_sheets(group_records(records))
    by = ("reference: fp8_product, int_linear, kv_attend", "triton: int_linear")
    assert sheet.caption.endswith(" ".join(f"Kernels by the backend {each}." for each in by))
    (sheet,) = make_sheets(group_records([make(), make("a()")]))
    assert "Kernels" not in sheet.caption


def alike(record, row):
    """Whether a record has the name or the steps of one in the row."""
    names, steps = {other.cell.recipe for other in row.values()}, {other.cell.steps for other in row.values()}
    return record.cell.recipe in names or record.cell.steps in steps


def slow_rows(records):
    """Rows by comparing every record with every row, as a check of the sorting by keys."""
    rows = []
    for record in sorted(records, key=lambda record: (record.started, record.name)):
        mine = {}
        for row in rows:
            cell = dataclasses.replace(next(iter(row.values())).cell, seed=record.cell.seed)
            if cell.identity == record.cell.identity:
                mine = row
        rows = [row for row in rows if not alike(record, row)]
        rows.append(mine | {record.cell.seed: record})
    return {frozenset(record.started + record.name for record in row.values()) for row in rows}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["x()", "y()", "z()"]), st.integers(0, 2), st.integers(0, 1)),
        min_size=1,
        max_size=12,
    )
)
def test_rows_are_those_of_comparing_all_with_all(cells):
    """Renamed rows, edited rows and edited methods in any order."""
    records = [
        make(name, seed, steps=steps, digests={"methods": str(edit)}, metrics={}, samples={}, protocols={},
             started=f"2026-01-01T00:00:{i:02}+00:00")
        for i, (name, steps, seed, edit) in enumerate(cells)
    ]  # fmt: skip
    random.Random(0).shuffle(records)
    (table,) = group_records(records)
    assert {frozenset(r.started + r.name for r in row.records) for row in table.rows} == slow_rows(records)
    assert table.older == len(records) - len(table.records)


@pytest.mark.parametrize("digest", ["method.rtn", "methods", "files"])
def test_digests_of_a_row_do_not_split_a_table(digest):
    records = [make(), make("rtn()", digests={**make("rtn()").cell.digests, digest: "1"}), make("nf4()")]
    (table,) = group_records(records)
    assert len(table.rows) == 3


def test_a_tuned_row_stands_beside_the_one_that_is_not():
    """Even of the same steps; each row keeps its own records, and a caption says nothing of one row's grid."""
    settings = {"threads": 1, "dtype": "float32"}
    tuned = [
        make("fit-tuned", seed, steps="fit()", settings=settings | {"tune": ["fit()", "fit(lr=0.1)"]})
        for seed in (0, 1)
    ]
    (table,) = group_records([make(), *tuned, make("fit()")])
    assert [(row.recipe, len(row.records)) for row in table.rows] == [("baseline", 1), ("fit()", 1), ("fit-tuned", 2)]
    (other,) = group_records([make(tier="full"), make("fit()", tier="full")])
    assert all("tune" not in sheet.caption for sheet in make_sheets([table, other]))
