"""Records by name: what is meant is found, and what is not is one line that says what there is."""

from __future__ import annotations

import re

import pytest
from fake_records import make, store_records

from effbench.core.errors import Usage
from effbench.records.find import find_record
from effbench.records.publication import publish_records
from effbench.records.store import Store


@pytest.fixture
def results(tmp_path):
    """Two suites; one row twice by tier and by seed, one attempted twice."""
    folder = tmp_path / "results"
    rows = [make("gptq-4b", seed) for seed in (0, 1)] + [make("gptq-4b", tier="full"), make("only")]
    publish_records([*rows[:2], rows[3]], folder, "quick")
    store_records(folder, [rows[2], make("gptq-4b", suite="other"), make("again", outcome="oom", reason="no room")])
    store_records(folder, [make("again", attempt=2)])
    return folder


def test_rows_are_found_by_name_identity_and_file(results):
    only = find_record("quant/only", results)
    names = ("only", only.cell.identity, only.cell.identity[:8], only.name, only.name.removesuffix(".json"))
    assert {find_record(name, results).name for name in names} == {only.name}
    assert find_record("quant/gptq-4b", results, tier="quick", seed=1).cell.seed == 1
    assert find_record("quant/gptq-4b", results, tier="full").cell.tier == "full"
    assert find_record("again", results).outcome == "ok"  # the last attempt


def test_a_file_is_one_record(results):
    (path,) = (path for path in Store(results).folder("other", 1).glob("*.json") if path.name != "protocols.json")
    record = find_record(str(path), results)
    assert record.cell.suite == "other" and record.samples["recall_acc"]  # with what lies beside it
    alone = results.parent / "alone.json"
    alone.write_text(record.to_json())
    assert find_record(str(alone), results).metrics == record.metrics


@pytest.mark.parametrize(
    ("name", "narrower", "words"),
    [
        ("quant/gptq-4b", {}, "3 have this name; add tier=full|quick seed=0|1"),
        ("quant/gptq-4b", {"tier": "quick"}, "2 have this name; add seed=0|1"),
        ("gptq-4b", {"tier": "quick", "seed": 0}, "2 have this name; name it other/gptq-4b or quant/gptq-4b"),
        ("quant/only", {"seed": 3, "tier": None}, "none is of seed=3; there is seed=0"),
        ("quant/onyl", {}, "has this name; did you mean 'quant/only' or 'quant/again'?"),
        ("nothing", {}, "name one as SUITE/ROW, of the suites other, quant"),
        ("{results}/records/quant/v1/quick.parquet", {}, "holds many records; name one as SUITE/ROW"),
        ("{results}/records/quant/v1/protocols.json", {}, "not an effbench record"),
        ("{results}/../alone.json", {"seed": 0}, "seed= chooses among records of one name"),
        ("~nobody-there/x", {}, "record=~nobody-there/x: "),
    ],
)
def test_what_is_no_one_record_is_one_line(results, name, narrower, words):
    (results.parent / "alone.json").write_text(make("only").to_json())
    with pytest.raises(Usage, match=re.escape(words)) as told:
        find_record(name.replace("{results}", str(results)), results, **narrower)
    assert len(str(told.value).splitlines()) == 1


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(Usage, match="there are no records in"):
        find_record("quant/only", tmp_path)


def test_hosts_apart_are_named_by_identity(tmp_path):
    store_records(tmp_path, [make("row", settings={"host": host}) for host in ("one", "two")])
    with pytest.raises(Usage, match=r"name one by its identity: [0-9a-f]{16}, [0-9a-f]{16}"):
        find_record("quant/row", tmp_path)
