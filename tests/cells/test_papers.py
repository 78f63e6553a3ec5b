"""Paper files: what ships is whole and states its protocol as the data have it; a mistake is one line."""

from __future__ import annotations

import re

import pytest
import yaml

from effbench import sources
from effbench.cells import papers
from effbench.cells.papers import PAPERS, load, names, read_without
from effbench.cells.verify import list_mismatches
from effbench.core import registry
from effbench.core.errors import Usage

ENTRIES = load()


def test_every_method_has_a_published_number_or_a_reason_for_none():
    numbered = {entry.number.method for entry in ENTRIES} - {papers.BASELINE}
    without = read_without()
    methods = set(registry.catalog())
    assert sorted(methods - numbered - without.keys()) == []
    assert sorted(numbered & without.keys()) == []
    assert without.keys() <= methods and numbered <= methods | set(registry.presets())


def test_what_ships_can_be_measured_or_says_what_is_lacking():
    measurable = [entry for entry in ENTRIES if not entry.number.lacks]
    assert len(measurable) > 50 and len(ENTRIES) > len(measurable)
    assert {entry.name: list(list_mismatches(entry)) for entry in measurable if list(list_mismatches(entry))} == {}


@pytest.mark.parametrize("name", names())
def test_every_part_of_a_file_is_used_and_every_number_is_of_a_place(name):
    body = yaml.safe_load((PAPERS / f"{name}.yaml").read_text(encoding="utf-8"))
    numbers = body["numbers"]
    assert {number["protocol"] for number in numbers} == body["protocols"].keys()
    assert body.get("models", {}).keys() <= {number["model"] for number in numbers}
    assert all(number["table"] for number in numbers)
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|\S+/\S+( .*)?", body["source"])
    measurable = {number["model"] for number in numbers if not number.get("lacks")}
    assert measurable <= body.get("models", {}).keys()  # another model is told by its configuration
    assert all(sources.model(model).kind == "hub" for model in measurable)


@pytest.fixture
def body():
    """A file of one number, as plain values."""
    return {
        "source": "arXiv:0000.00000",
        "paper": "Nobody, 2026",
        "evidence": "authors",
        "protocols": {
            "heldout": {
                "metric": "token_ppl", "data": "tiny", "dataset": "tiny", "split": "heldout", "join": "\n\n",
                "tokens": 256, "window": 64, "stride": 64,
            }
        },
        "numbers": [
            {
                "name": "row", "method": "rtn", "model": "tiny", "protocol": "heldout", "table": "Table 1",
                "value": 5.0, "tolerance": 0.01, "steps": "rtn(bits=3)",
            }
        ],
    }  # fmt: skip


def put(path, body):
    path.write_text(body if isinstance(body, str) else yaml.safe_dump(body))
    return str(path)


def test_a_file_of_one_s_own_is_read(tmp_path, body):
    (entry,) = load(put(tmp_path / "mine.yaml", body))
    assert entry.name == "mine/row" and not list(list_mismatches(entry))
    assert entry.settings == {"probes": ["perplexity"], "window": 64, "stride": 64, "text_tokens": 256}


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("numbers.0.value", "1.5", "numbers[0].value='1.5': must be a number, not str"),
        ("numbers.0.value", float("inf"), "must be a number"),
        ("numbers.0.tolerance", 0, "tolerance=0: must be a number above 0 or None"),
        ("numbers.0.tolerance", None, "tolerance: is missing; or say with lacks:"),
        ("numbers.0.steps", None, "steps: is missing; or say with lacks:"),
        ("numbers.0.steps", "rtn(bit=3)", "no parameter 'bit'"),
        ("numbers.0.steps", "nf4()", "is a recipe of nf4, and no number of rtn"),
        ("numbers.0.steps", "gptq(bits=3)", "protocols.heldout.calibration: is missing"),
        ("numbers.0.steps", "lora()", "acts through the fit"),
        ("numbers.0.method", "rtm", "unknown method 'rtm'; did you mean 'rtn'"),
        ("numbers.0.protocol", "held", "unknown protocol 'held'; did you mean 'heldout'"),
        ("numbers.0.settings", {"windw": 3}, "windw: unknown key; did you mean 'window'?"),
        ("numbers.0.sttings", {}, "numbers[0].sttings: unknown key; did you mean 'settings'?"),
        ("numbers", [], "numbers: is empty"),
        ("protocols.heldout.data", None, "protocols.heldout.data: is missing"),
        ("protocols.heldout.window", None, "protocols.heldout.window: is missing"),
        ("protocols.heldout.join", None, "protocols.heldout.join: is missing"),
        ("protocols.heldout.metric", "word_perplexity", "metric 'word_perplexity' has no definition"),
        ("evidence", "memory", "evidence='memory': must be one of 'transcription', 'authors'"),
        ("source", None, "source=None: must be text"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_place(tmp_path, body, where, value, words):
    *path, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    place = body
    for part in path:
        place = place[part]
    place[last] = value
    if words.startswith("protocols.heldout.calibration"):
        body["numbers"][0]["method"] = "gptq"
    file = put(tmp_path / "mine.yaml", body)
    with pytest.raises(Usage) as told:
        load(file)
    assert words in str(told.value) and str(told.value).startswith(f"{file}: ")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("numbers: [", "line 1"),
        ("", "must hold keys such as source"),
        ("- 1", "must hold keys such as source"),
        ("source: &a x", "anchors"),
        ("source: x\nsource: y", "source is given twice"),
        ("source: x", "paper: is missing"),
    ],
)
def test_what_is_no_paper_file_is_one_line(tmp_path, text, words):
    with pytest.raises(Usage, match=re.escape(words)):
        load(put(tmp_path / "mine.yaml", text))


def test_two_numbers_of_one_name_are_refused(tmp_path, body):
    body["numbers"].append(dict(body["numbers"][0]))
    with pytest.raises(Usage, match=r"numbers.row: two numbers have this name"):
        load(put(tmp_path / "mine.yaml", body))


def test_names_of_papers_are_known(tmp_path):
    with pytest.raises(Usage, match="unknown paper 'gptk'; did you mean 'gptq'"):
        load("gptk")
    with pytest.raises(Usage, match="no such file"):
        load(str(tmp_path / "gone.yaml"))


def test_a_reason_is_given_in_words(tmp_path):
    put(tmp_path / "without.yaml", "rtn: ~\n")
    with pytest.raises(Usage, match="rtn: give the reason in words"):
        read_without(tmp_path)


def test_the_example_of_the_page_is_read_and_stands_in_the_files(tmp_path):
    page = (PAPERS.resolve().parent.parent / "docs" / "reproduce.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (entry,) = load(put(tmp_path / "gptq.yaml", text))
    (shipped,) = (each for each in load("gptq") if each.number.name == entry.number.name)
    assert entry.number == shipped.number and entry.protocol == shipped.protocol
