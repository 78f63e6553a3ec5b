"""Files in which something was changed: read with types checked, or named and skipped, never a traceback."""

from __future__ import annotations

import json
import logging
import random
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effbench.records.publication import publish_records
from effbench.records.record import Record, Summary, read_text, summarize
from effbench.records.store import Store, latest
from effbench.report.groups import group_records
from effbench.report.pages import render

NASTY = (None, True, -1, 2**70, 1.5, "abc", "", "../x", [], {}, [None], {"a": None}, [[["b"]]])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
anyhow = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values within a value, and to itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, item in inner for path in places(item, (*here, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with one value replaced."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@pytest.fixture
def written(store, rich):
    """The content of the record's file, and the file."""
    store.write(rich)
    path = store.folder("fakes", 1) / rich.name
    return json.loads(path.read_text()), path


def survives(store: Store, path: Path) -> bool:
    """Whether what is in a file is a record, and then a sound one; else a note names the file in one line."""
    logging.disable()
    try:
        records, notes = store.read()
        for record in records:
            check_types(record)
            for style in ("md", "csv"):
                assert render([record], record.cell.suite, style)
    finally:
        logging.disable(logging.NOTSET)
    assert all("\n" not in note for note in notes)
    assert records or any(str(path) in note for note in notes)
    assert group_records(latest(records).values()) or not records
    return bool(records)


def look_at(record: Record) -> None:
    """Have everything loaded that is read when it is looked at."""
    assert isinstance(dict(record.samples), dict) and repr(record.log.get("layers"))


def check_types(record: Record) -> None:
    """Every field has the type that the record declares; raises otherwise."""
    look_at(record)
    again = summarize(record)
    msgspec.convert(msgspec.to_builtins(again), Summary)
    assert read_text(record.to_json()).metrics == record.metrics
    assert all(isinstance(text, str) for text in record.protocols.values())


def test_every_field_of_a_record_replaced(store, written):
    body, path = written
    outcomes = []
    for place in places(body):
        for value in NASTY:
            path.write_text(json.dumps(changed(body, place, value)))
            outcomes.append(survives(store, path))
    assert True in outcomes and outcomes.count(False) > 200, "most fields have a type that something violates"


@anyhow
@given(data=st.data())
def test_any_field_replaced_by_anything(store, written, data):
    body, path = written
    place = data.draw(st.sampled_from(places(body)))
    path.write_text(json.dumps(changed(body, place, data.draw(anything))))
    survives(store, path)


@anyhow
@given(data=st.data())
def test_any_field_of_an_old_record_replaced_by_anything(store, rich, written, data):
    _, path = written
    body = json.loads(rich.to_json()) | {"schema": data.draw(st.sampled_from([1, 2]))}
    body["metrics"] = {
        name: dict(zip(("value", "low", "high", "n"), values, strict=False)) for name, values in body["metrics"].items()
    }
    place = data.draw(st.sampled_from(places(body)))
    path.write_text(json.dumps(changed(body, place, data.draw(anything))))
    survives(store, path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("metrics", "token_ppl", 0), "abc"),
        (("metrics", "token_ppl", 3), 1.5),
        (("outcome",), "fine"),
        (("attempt",), 0),
        (("started",), "yesterday"),
        (("cell", "suite"), "../../etc"),
        (("cell", "resolved"), [{}]),
        (("cell", "seed"), None),
        (("kernels", "int_linear"), "many"),
        (("environment",), "../../../etc/passwd"),
        (("samples",), "../x"),
        (("simulated",), "yes"),
    ],
)
def test_an_ill_typed_field_is_refused(store, written, place, value):
    body, path = written
    path.write_text(json.dumps(changed(body, place, value)))
    records, (note, *_) = store.read()
    assert records == [] and str(path) in note


def test_a_field_that_nobody_knows_is_refused(store, written):
    body, path = written
    path.write_text(json.dumps(body | {"verdict": "best"}))
    records, (note,) = store.read()
    assert records == [] and "verdict" in note


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema":3,"cell":' * 5_000, "1e999", '"\\ud800"'])
def test_texts_that_break_parsers(store, written, text):
    _, path = written
    path.write_text(text)
    records, (note,) = store.read()
    assert records == [] and str(path) in note


@pytest.mark.parametrize("part", ["protocols.json", "environment"])
@anyhow
@given(data=st.data())
def test_shared_files_with_any_field_replaced(store, rich, part, data):
    store.write(rich)
    folder = store.folder("fakes", 1)
    path = folder / part if part == "protocols.json" else next((store.records / "environments").iterdir())
    good = path.read_text()
    body = json.loads(good)
    place = data.draw(st.sampled_from(places(body)))
    changed_text = json.dumps(changed(body, place, data.draw(anything)))
    path.write_text(changed_text)
    try:
        (record,), notes = store.read()
        check_types(record)
        assert record.metrics == rich.metrics
        assert notes or (record.protocols, record.environment) == (rich.protocols, rich.environment)
    finally:
        path.write_text(good)


# ---- publications ----


@pytest.fixture
def published(store, rich):
    return publish_records([rich], store.results, "full")


@anyhow
@given(seed=st.integers(0, 2**32))
def test_a_publication_with_changed_bytes(store, published, seed):
    good = published.read_bytes()
    random_ = random.Random(seed)
    body = bytearray(good)
    if random_.random() < 0.3:
        del body[random_.randrange(len(body)) :]
    else:
        for _ in range(random_.choice([1, 1, 5])):
            body[random_.randrange(len(body))] = random_.randrange(256)
    try:
        published.write_bytes(body)
        survives(store, published)
    finally:
        published.write_bytes(good)


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for group in (0, 1) for row in pq.ParquetFile(path).read_row_group(group).to_pylist()]


def write_rows(path: Path, all_rows: list[dict[str, Any]], split: int) -> None:
    kind = pq.read_schema(path)
    with pq.ParquetWriter(path, kind) as writer:
        for part in (all_rows[:split], all_rows[split:]):
            writer.write_table(pa.Table.from_pylist(part, kind))


def test_a_publication_with_every_cell_replaced(store, published):
    good = rows(published)
    split = pq.ParquetFile(published).metadata.row_group(0).num_rows
    for i, row in enumerate(good):
        for column in row:
            for value in ([None], [], [1.0] * 4) if column == "values" else (None, "abc", "{}", "[1]", '{"schema":3}'):
                write_rows(published, [*good[:i], row | {column: value}, *good[i + 1 :]], split)
                logging.disable()
                records, notes = store.read()
                logging.disable(logging.NOTSET)
                assert records or notes
                for record in records:
                    look_at(record)
                    check_types(record)


def test_a_parquet_file_of_something_else(store, published, rich):
    pq.write_table(pa.table({"recipe": ["a"], "ppl": [1.0]}), published)
    records, (note,) = store.read()
    assert records == [] and "a parquet file of other content" in note and str(published) in note


def test_a_damaged_publication_costs_itself_only(store, published, rich):
    loose = Path(tempfile.mkdtemp(dir=store.results)) / "x"
    loose.write_text("no record")  # beside the records: nobody looks there
    published.with_name("other.parquet").write_bytes(b"PAR1 not really PAR1")
    records, (note,) = store.read()
    assert records == [rich] and "other.parquet" in note
