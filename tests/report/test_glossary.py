"""Units and definitions reach every place that shows metrics."""

import json

import pytest
from fake_records import make

from effbench.cli.main import main
from effbench.records.definitions import DEFINITIONS
from effbench.report.glossary import select_definitions, write_list, write_page
from effbench.report.groups import group_records
from effbench.report.pages import render, render_headline
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


@pytest.mark.parametrize("name", ["no_such_thing", "a\0b", ""])
def test_what_is_no_name_is_one_line(name, capsys):
    assert main(["show", name]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_has_one_list_below_its_tables_and_its_parts_have_none():
    page = render([make(), make(tier="full")], "quant")
    assert page.count("**Metrics**") == 1 and page.rindex("| baseline") < page.index("**Metrics**")
    assert "- kl_nats_per_token (nats): " in page
    assert "**Metrics**" not in render_headline(make_sheets(group_records([make()])))
    assert "**Metrics**" not in render([make()], "quant", detail="speed")
