"""Plots in documents: made from records, noticed when they are not, and checked without drawing."""

import importlib
import json
import re

import pytest
from fake_records import RECORDS, make, store_records

from effbench.core.errors import Usage
from effbench.core.paths import CHECKOUT, PUBLISHED
from effbench.records.store import Store
from effbench.report import drawings
from effbench.report.drawings import read_facts
from effbench.report.pages import check, write

MARKER = "<!-- effbench:plot quant x=stored -->\n<!-- /effbench:plot -->\n"


@pytest.fixture
def results(tmp_path):
    """A folder of results with a README beside it that has a plot, both up to date."""
    results = store_records(tmp_path / "results", [*RECORDS, make("a[b]_c()", worse=0.01, bits=6)]).results
    (tmp_path / "README.md").write_text(f"# Top\n\n{MARKER}\nRest\n")
    write(results, None, tmp_path / "README.md")
    return results


def get_readme(results):
    return results.parent / "README.md"


def get_plot(results):
    (file,) = (results / "plots").iterdir()
    return file


def test_a_marker_becomes_a_plot(results):
    text = get_readme(results).read_text()
    assert text.startswith("# Top\n\n<!-- effbench:plot quant x=stored -->\n![") and text.endswith("\nRest\n")
    address = re.search(r"\]\((results/plots/[a-z0-9-]+\.svg)\)", text)[1]
    assert results.parent / address == get_plot(results)
    assert r"a\[b\]\_c()" in text  # brackets would end the alternative text
    assert re.search(r"\n\n.*: \d of \d rows are on the front with 90 %", text)


def test_the_file_says_its_numbers(results):
    facts = read_facts(get_plot(results).read_text())
    spots = {spot["name"]: spot for spot in facts["picture"]["spots"]}
    assert spots["gptq(bits=4)"]["x"][0] == 4.25e6 and spots["gptq(bits=4)"]["status"] == "robust"


def test_nothing_is_drawn_to_check(results, monkeypatch):
    def refuse(name, *arguments):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert check(results, None, get_readme(results)) == []
    assert write(results, None, get_readme(results)) == []
    get_plot(results).unlink()
    with pytest.raises(Usage, match=r"drawing .*\.svg needs matplotlib: pip install"):
        check(results, None, get_readme(results))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("baseline</text>", "my own</text>"),
        lambda text: text.replace('"probability": 1.0', '"probability": 0.5', 1),
        lambda text: re.sub(r"M (\d)", r"M 1\1", text, count=1),
        lambda text: text.replace(drawings.get_version(), "0" * 16),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "<svg/>",
    ],
)
def test_a_plot_that_is_not_what_was_drawn_is_named(results, spoil):
    file = get_plot(results)
    text = file.read_text()
    assert spoil(text) != text
    file.write_text(spoil(text))
    (told,) = check(results, None, get_readme(results))
    assert told.startswith(f"{file}: ")
    assert write(results, None, get_readme(results)) == [file] and file.read_text() == text


def test_other_records_make_another_plot(results):
    before = get_plot(results).read_text()
    Store(results).write(make("new()", worse=0.0, bits=3.0))
    assert any(told.startswith(f"{get_plot(results)}: ") for told in check(results, None, get_readme(results)))
    write(results, None, get_readme(results))
    assert "new()" in get_plot(results).read_text() and get_plot(results).read_text() != before


def test_a_plot_of_another_version_of_matplotlib_counts(results):
    """Its drawing differs and its numbers do not."""
    file = get_plot(results)
    text = file.read_text()
    facts = read_facts(text)
    other = re.sub(r"M (\d)", r"M 1\1", text, count=1)
    digest = re.search(r"digest&quot;: &quot;(\w{16})|\"digest\": \"(\w{16})", other)
    old = digest[1] or digest[2]
    other = other.replace(old, drawings.BLANK)
    file.write_text(other.replace(drawings.BLANK, drawings.compute_digest(other)))
    assert read_facts(file.read_text()) == facts and check(results, None, get_readme(results)) == []


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("quantt", "no records of suite 'quantt'; did you mean 'quant'"),
        ("quant x=storde", "x=storde: no metric that can be better or worse has this name"),
        ("quant y=nothing", "y=nothing: no metric that can be better or worse has this name"),
        ("quant tier=full", "unknown tier 'full'"),
        ("quant rows=nothing*", "rows=nothing*: no row has this name"),
        ("quant rows=rtn(bits=2)", "nothing to plot"),
        ("quant columns=bits", "unknown option 'columns'"),
    ],
)
def test_bad_markers_cost_one_line(results, marker, message):
    get_readme(results).write_text(f"<!-- effbench:plot {marker} -->\n<!-- /effbench:plot -->\n")
    with pytest.raises(Usage) as caught:
        check(results, None, get_readme(results))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(get_readme(results)) in str(caught.value)


def test_two_plots_of_one_name_are_refused(results):
    rows = MARKER.replace("x=stored", "x=stored rows=rtn*,gptq*")
    get_readme(results).write_text(MARKER + rows)
    with pytest.raises(Usage, match="two plots are called"):
        check(results, None, get_readme(results))


@pytest.mark.skipif(CHECKOUT is None or PUBLISHED is None, reason="needs a source checkout")
def test_the_readme_opens_with_a_small_plot():
    lines = (CHECKOUT / "README.md").read_text(encoding="utf-8").splitlines()[:12]
    (address,) = [match[1] for line in lines if (match := re.match(r"!\[.*\]\((results/plots/.*\.svg)\)", line))]
    file = CHECKOUT / address
    assert file.stat().st_size < 100_000 and json.dumps(read_facts(file.read_text(encoding="utf-8"))) != "null"
