"""A publication: records with all that was measured on them, item by item and layer by layer, in one parquet file.

The rows of the first row group are what is read at once:

| part | places | values | text |
| --- | --- | --- | --- |
| summary | | | the record's summary without metrics, as JSON |
| metric | its name | value, low, high, n | findings, as JSON |

and those of the second what is read when it is looked at:

| part | places | values | text |
| --- | --- | --- | --- |
| sample | names and places of one column of per-item results | numbers | values that are not numbers, as JSON |
| layer | names of layers | a number each | name of the number |
| layers | | | the log of layers as JSON, where it holds more than numbers |

`record` is the name of the record in all of them, places are JSON. Numbers are float64 and come back bit by bit.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from effbench.core.errors import first_line
from effbench.records import files
from effbench.records.metric import Finding, Metric
from effbench.records.record import Summary, Unreadable, read_text, write_text
from effbench.records.samples import Column, Place, Samples

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIX = ".parquet"
LEVEL = 19  # of zstd: written seldom, read often
EXACT = 2**53  # larger whole numbers are no float64


class Row(msgspec.Struct):
    """A row of the file."""

    record: str
    part: str
    places: str | None = None
    values: Sequence[float | None] | None = None
    text: str | None = None


def pack(records: Sequence[tuple[str, Summary, Samples]]) -> bytes:
    """The file of records by name; summaries refer to environments and protocols by digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Rows that are alike stand together: they compress better.
    first = sorted((row for name, summary, _ in records for row in _summary_rows(name, summary)), key=_order)
    second = sorted((row for name, _, samples in records for row in _sample_rows(name, samples)), key=_order)
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        _schema(),
        compression="zstd",
        compression_level=LEVEL,
        use_dictionary=["record", "part", "places", "text"],
        use_byte_stream_split=["values.list.element"],
        write_page_checksum=True,
    ) as writer:
        for rows in (first, second):
            writer.write_table(pa.Table.from_pylist([msgspec.structs.asdict(row) for row in rows], _schema()))
    return buffer.getvalue()


def read_summaries(path: Path) -> tuple[dict[str, Summary], list[str]]:
    """Summaries with their metrics, by name, and a note for each that is skipped. Raises `Unreadable`."""
    summaries: dict[str, Summary] = {}
    metrics: dict[str, dict[str, Metric]] = {}
    notes: dict[str, str] = {}
    for row in _rows(path, 0):
        try:
            if row.part == "summary":
                summaries[row.record] = read_text(row.text or "")
            elif row.part == "metric":
                metrics.setdefault(row.record, {})[row.places or ""] = _metric(row)
        except Unreadable as error:
            notes[row.record] = str(error)
    for name in metrics.keys() - summaries.keys() - notes.keys():
        notes[name] = "it has metrics and no summary"
    for name, summary in summaries.items():
        summary.metrics = metrics.get(name, {})
        if not isinstance(summary.environment, str) or not isinstance(summary.protocols, str):
            notes[name] = "its environment and protocols are not told by digest"
    kept = {name: summary for name, summary in summaries.items() if name not in notes}
    return kept, [f"{name}: skipped, {note}" for name, note in sorted(notes.items())]


def read_packed(path: Path, name: str) -> Samples:
    """Per-item results and log of layers of one record. Raises `Unreadable`."""
    try:
        state = path.stat()
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None
    return _all_samples(path, state.st_mtime_ns, state.st_size).get(name, Samples())


@functools.lru_cache(maxsize=2)  # records of one table are looked at one after the other
def _all_samples(path: Path, *_state: int) -> dict[str, Samples]:
    """Samples of all records of a file, by name."""
    by_record: dict[str, Samples] = {}
    for row in _rows(path, 1):
        samples = by_record.setdefault(row.record, Samples([], {}))
        if row.part == "sample":
            values = _json(row.text, list[Any]) if row.values is None else list(row.values)
            samples.columns.append(Column(_json(row.places, list[Place]), values))
        elif row.part == "layers":
            samples.layers.update(_json(row.text, dict[str, Any]))
        elif row.part == "layer":
            for layer, value in zip(_json(row.places, list[str]), row.values or (), strict=False):
                samples.layers.setdefault(layer, {})[row.text] = value
    return by_record


def _schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    kinds = {"record": text, "part": text, "places": text, "values": pa.list_(pa.float64()), "text": text}
    return pa.schema(list(kinds.items()))


def _rows(path: Path, group: int) -> Iterator[Row]:
    """Rows of one of the two groups. Raises `Unreadable`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(_schema()) or file.num_row_groups != 2:
                raise Unreadable("a parquet file of other content")
            table = file.read_row_group(group)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or first_line(error)})") from None
    except (pa.ArrowException, ValueError, UnicodeError) as error:
        raise Unreadable(f"not a whole parquet file ({first_line(error)})") from None
    for entry in table.to_pylist():
        if entry["record"] is None or entry["part"] is None:
            raise Unreadable("a parquet file of other content")
        yield Row(**entry)


def _summary_rows(name: str, summary: Summary) -> Iterator[Row]:
    for metric, one in summary.metrics.items():
        findings = files.canonical(one.findings).decode() if one.findings else None
        yield Row(name, "metric", metric, [one.value, one.low, one.high, one.n], findings)
    yield Row(name, "summary", text=write_text(msgspec.structs.replace(summary, metrics={})))


def _sample_rows(name: str, samples: Samples) -> Iterator[Row]:
    for column in samples.columns:
        places = files.canonical(column.places).decode()
        if all(map(_is_number, column.values)):
            yield Row(name, "sample", places, list(map(float, column.values)))
        else:
            yield Row(name, "sample", places, text=files.canonical(column.values).decode())
    numbers: dict[str, dict[str, float]] = {}
    for layer, log in samples.layers.items():
        if not isinstance(log, Mapping) or not log or not all(map(_is_number, log.values())):
            yield Row(name, "layers", text=files.canonical(samples.layers).decode())
            return
        for field, value in log.items():
            numbers.setdefault(field, {})[layer] = float(value)
    for field, by_layer in numbers.items():
        yield Row(name, "layer", files.canonical(list(by_layer)).decode(), list(by_layer.values()), field)


def _order(row: Row) -> tuple[str, str, str]:
    return row.part, (row.text or "") if row.part == "layer" else row.places or "", row.record


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= EXACT)


def _metric(row: Row) -> Metric:
    values = [*(row.values or ())]
    if len(values) != 4 or values[0] is None or not all(math.isfinite(value) for value in values if value is not None):
        raise Unreadable(f"the metric {row.places} has no value")
    value, low, high, n = float(values[0]), *values[1:]
    return Metric(value, low, high, None if n is None else int(n), _json(row.text or "{}", dict[str, Finding]))


def _json(text: str | None, kind: Any) -> Any:
    try:
        return msgspec.json.decode(text or "", type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Unreadable(f"a parquet file of other content ({error})") from None
