"""The page in HTML, as text: names stay text, links lead somewhere, nothing is fetched, data are those of records."""

import base64
import collections
import hashlib
import html.parser
import json
import math
import re

import pytest
from fake_records import RECORDS, failed, make, store_records

from effbench.cli.main import main
from effbench.records.metric import Metric
from effbench.report.folder import MARK
from effbench.report.groups import group_records
from effbench.report.page import make_page
from effbench.report.styles.html import write_data

HOSTILE = ("<script>alert(1)</script>", r"a_b&50%#{x}\input{y}", '"><img src=x onerror=alert(2)>', "{{ 7*7 }}")


class Parsed(html.parser.HTMLParser):
    """What a browser would make of the page: its elements, the texts in them, and the scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = (
            collections.Counter(),
            [],
            collections.defaultdict(list),
            [],
        )
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, text):
        self.texts[self._open[-1] if self._open else ""].append(text)

    def collect(self, name):
        return [value for _, attributes in self.attributes if (value := attributes.get(name)) is not None]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of one suite, and one of all."""
    folder = tmp_path_factory.mktemp("page")
    records = [*RECORDS, *(make(name, worse=0.1, bits=5) for name in HOSTILE), failed("x()", reason="<b>no</b>")]
    store = store_records(folder / "results", records)
    store.write(make(suite="other", metrics={"token_ppl": Metric(5.0), "odd metric%": Metric(1.0)}))
    for words in ((), ("suite=quant",)):
        assert main(["report", f"results={store.results}", "format=html", f"to={folder / 'to'}", *words]) == 0
    assert {file.name for file in (folder / "to").iterdir()} == {"all-suites.html", "quant.html"}
    return {name: (folder / "to" / f"{name}.html").read_text() for name in ("all-suites", "quant")}


@pytest.fixture(scope="module")
def page(pages):
    return Parsed(pages["all-suites"])


def read_data(page):
    (text,) = [text for text in page.texts["script"] if text.startswith("{")]
    return json.loads(text)


def test_names_are_text(page):
    assert page.tags["script"] == 3 and page.tags["img"] == 0  # data, plotly, the page's own
    assert not [name for _, attributes in page.attributes for name in attributes if name.startswith("on")]
    assert {*HOSTILE} <= {*page.texts["a"]}
    assert any("<b>no</b>" in text for text in page.texts["li"])
    assert {*HOSTILE} <= {row["name"] for row in read_data(page)["rows"]}


def test_every_link_leads_somewhere(page):
    ids = page.collect("id")
    assert len(ids) == len({*ids})
    rows, metrics = read_data(page)["rows"], read_data(page)["metrics"]
    links = page.collect("href")
    numbers = 0
    for link in links:
        if match := re.fullmatch(r"#row-(\d+)(?:/(.+))?", link):
            records = [read for read in rows[int(match[1])]["records"]]
            assert records and (match[2] is None or re.sub("%25", "%", match[2].replace("%20", " ")) in metrics)
            numbers += match[2] is not None
        else:
            assert link == "data:," or link.removeprefix("#") in ids, link
    assert numbers > 100


def test_every_number_is_linked(page):
    """No cell that shows a metric is without a link to its record."""
    (table,) = group_records(RECORDS)
    sections, _ = make_page([table])
    shown = sum(
        bool(heading.metric) and entry.key != ""
        for line in sections[0].lines
        for heading, entry in zip(sections[0].headings, line.entries, strict=True)
    )
    assert shown >= 40
    for line in sections[0].lines:
        for heading, entry in zip(sections[0].headings, line.entries, strict=True):
            if heading.metric and entry.key != "":
                row = next(row for row in table.rows if row.recipe == line.name.recipe)
                assert entry.key == row.estimate(heading.metric).value


def test_records_are_whole(page):
    data = read_data(page)
    row = next(row for row in data["rows"] if row["name"] == "gptq(bits=4)")
    record = data["records"][row["records"][1]]
    (original,) = [one for one in RECORDS if one.cell.recipe == "gptq(bits=4)" and one.cell.seed == 1]
    assert record["name"] == original.name and record["cell"]["identity"] == original.cell.identity
    metric = original.metrics["token_ppl"]
    assert record["metrics"]["token_ppl"][:4] == [metric.value, metric.low, metric.high, metric.n]
    assert data["protocols"][record["protocols"]["token_ppl"]] == original.protocols["token_ppl"]
    assert data["environments"][record["environment"]] == original.environment


def test_only_named_scripts_run_and_nothing_is_fetched(pages, page):
    policy = next(a["content"] for _, a in page.attributes if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]
    scripts = re.findall(r"<script>(.*?)</script>", pages["all-suites"], re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert page.tags["link"] == 1 and not page.collect("src") and not page.collect("action")
    assert not [link for link in page.collect("href") if not link.startswith(("#", "data:"))]


def test_one_copy_of_plotly(pages):
    for text in pages.values():
        assert text.count("Copyright 2012-") == 1 and MARK in text
        assert len(text) < 6_000_000


def test_failures_have_footnotes(page):
    data = read_data(page)
    assert {record["outcome"] for record in data["records"]} == {"ok", "oom"}
    assert page.texts["span"].count("oom") == 2
    assert any("needs 9 GiB" in text for text in page.texts["li"])


def test_infinite_not_a_number_and_missing_are_three_things():
    metrics = {"token_ppl": Metric(math.inf), "kl_nats_per_token": Metric(math.nan), "stored_bytes": Metric(1.0)}
    (table,) = group_records([make(metrics=metrics)])
    sections, data = make_page([table])
    entries = dict(zip((h.metric for h in sections[0].headings), sections[0].lines[0].entries, strict=True))
    assert (entries["token_ppl"].text, entries["kl_nats_per_token"].text) == ("inf", "nan")
    assert data["records"][0]["metrics"]["token_ppl"][:2] == ["inf", None]
    assert json.loads(write_data(data))["records"][0]["metrics"]["kl_nats_per_token"][0] == "nan"
    assert "tasks_acc" not in data["records"][0]["metrics"]


def test_plots_are_of_every_pair(page):
    plots = next(plot for plot in read_data(page)["plots"] if plot["pictures"])
    assert [*plots["x"]] == ["stored_bytes"] and next(iter(plots["y"])) == "token_ppl" and len(plots["y"]) == 3
    assert {*plots["pictures"][0]} == {"x", "y", "spots", "absent", "once", "corners"}
    assert {spot["status"] for spot in plots["pictures"][0]["spots"]} == {"robust", "open", "excluded"}


def test_the_same_records_give_the_same_page(tmp_path):
    folder = store_records(tmp_path / "results").results
    for name in ("one", "other"):
        assert main(["report", f"results={folder}", "format=html", f"to={tmp_path / name}", "rows=rtn*"]) == 0
    one, other = ((tmp_path / name / "all-suites.html").read_bytes() for name in ("one", "other"))
    assert one == other and b">gptq" not in one and b"rtn(bits=8)" in one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["format=html"], "format=html writes files: name a folder, to=FOLDER"),
        (["format=html", "to=x", "detail=speed"], "has all columns to choose from"),
        (["format=html", "to=x", "columns=bits"], "has all columns to choose from"),
        (["format=html", "to=x", "x=bits"], "x= and y= are axes of plots"),
        (["format=html", "to=x", "--published"], "--published has a table of its own"),
        (["format=html", "to=x", "suite=nothing"], "no records of suite 'nothing'"),
    ],
)
def test_bad_input_costs_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = store_records(tmp_path / "results").results
    assert main(["report", f"results={results}", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and not (tmp_path / "x").exists()
