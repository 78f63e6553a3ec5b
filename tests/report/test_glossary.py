"""Units and definitions reach every place that shows metrics."""

import json
import re

import pytest
from fake_records import make

from effbench.cli.main import main
from effbench.core.paths import PUBLISHED
from effbench.records.definitions import DEFINITIONS
from effbench.report.blocks import TableBlock, render_table
from effbench.report.columns import list_columns, make_columns
from effbench.report.fronts import make_front_columns
from effbench.report.glossary import select_definitions, write_columns, write_list, write_page
from effbench.report.groups import group_records
from effbench.report.metrics import get_title, select_perplexities
from effbench.report.pages import load, render
from effbench.report.published import MEANINGS, make_published_sheets
from effbench.report.sheets import make_sheets


def test_each_definition_is_listed_once_and_unknown_names_are_left_out():
    names = ["prefill_speedup_b1_c128", "decode_speedup_b8_c128", "token_ppl", "of_another_version"]
    assert [one.pattern for one in select_definitions(names)] == ["token_ppl", "{phase}_speedup_b{batch}_c{context}"]
    assert write_list(names).count("\n") == 1 and "unchanged model" in write_list(names)


def test_the_page_has_all_of_them():
    page = write_page()
    assert all(f"`{one.pattern}`" in page for one in DEFINITIONS)


def test_show_tells_what_a_metric_means(capsys):
    assert main(["show", "tiny_facts_acc"]) == 0
    assert capsys.readouterr().out.startswith("{task}_acc (fraction): The share of items")
    assert main(["show", "kl_nats_per_token", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unit"] == "nats"


@pytest.mark.parametrize("suite", ["quant", "prune", "adhoc"])
@pytest.mark.skipif(PUBLISHED is None or not PUBLISHED.is_dir(), reason="nothing published here")
def test_every_column_of_the_published_tables_is_defined(suite, capsys):
    """The same words as in the glossary, where a task and a batch are examples."""
    assert main(["report", "--glossary"]) == 0
    text = capsys.readouterr().out
    records = load(PUBLISHED, suite)
    for table in group_records(records):
        columns = [column for detail in make_columns(table.measured).values() for column in detail]
        for column in columns:
            assert column.explain() and column.explain() in text, column.header
        fronts = make_front_columns(table)
        assert all(column.explain() in text for column in fronts)
        known = {column.header for column in [*columns, *fronts]} | {"recipe"}
        for sheet in make_sheets([table]):
            assert known >= {header for grid in sheet.grids for header in grid.header}
    titles = {*map(get_title, (*select_perplexities(records[0].metrics), "tasks_acc")), "recipe"}
    for sheet in make_published_sheets(records):
        assert {*MEANINGS, *titles} >= {*sheet.grids[0].header}
        assert all(f"  {header}: {meaning}" in text for header, meaning in MEANINGS.items())


def test_the_glossary_has_every_metric_that_a_column_shows_and_every_mark():
    text = write_columns()
    for columns in list_columns().values():
        for column in columns:
            assert f"  {column.header}: {column.explain()}\n" in f"{text}\n" and len(column.explain()) > 20
    for mark in "±ˢ–↑":
        assert mark in text
    assert "decode, × (tok/s, ms)" in text and "zeros, %" in text and "bits: " in text and text.startswith("recipe: ")


def test_no_metric_is_without_a_column_that_defines_it_with_its_unit():
    columns = [column for columns in list_columns().values() for column in columns]
    text = write_columns()
    for one in DEFINITIONS:
        shown = [column for column in columns if any(map(one.regex.fullmatch, column.metrics))]
        assert shown, one.pattern
        assert any(one.meaning.rstrip(".")[1:] in column.explain() for column in shown)
    for column in columns:
        said = column.explain()
        assert f"  {column.header}: {said}\n" in f"{text}\n" and said.endswith(".")
        assert not column.metrics or re.search(r" (In [\w/µ -]+|As a ratio|Without a unit)\.", said), said
    for word in ("flips", "reference bytes", "model bits per weight", "decode floor ms per token b1 c1"):
        assert f"\n  {word}: " in text


def test_no_two_columns_of_a_table_read_alike():
    for detail in ("quality", "memory", "methods", "chosen"):
        said = [column.explain() for column in list_columns()[detail]]
        assert len(said) == len(set(said)), detail


@pytest.mark.parametrize("name", ["no_such_thing", "a\0b", ""])
def test_what_is_no_name_is_one_line(name, capsys):
    assert main(["show", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_has_one_list_below_its_tables_and_its_parts_have_none():
    page = render([make(), make(tier="full")], "quant")
    assert page.count("**Metrics**") == 1 and page.rindex("| baseline") < page.index("**Metrics**")
    assert "- kl_nats_per_token (nats): " in page
    assert "**Metrics**" not in render_table(group_records([make()]), TableBlock(), "quant.md")
    assert "**Metrics**" not in render([make()], "quant", detail="speed")
