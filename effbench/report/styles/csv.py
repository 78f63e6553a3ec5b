"""The records behind tables as CSV: one row per record, columns agreed in results/README.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from effbench.records.metric import Metric
from effbench.report.choice import ALL, Choice
from effbench.report.groups import Table, get_machine
from effbench.report.metrics import get_limits, natural_key
from effbench.report.text import one_line

START = (
    "suite", "suite_version", "recipe", "steps", "model", "seed", "outcome", "reason", "simulated", "machine",
)  # fmt: skip
END = ("tier", "record")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a formula begins with


def page(tables: Sequence[Table], choice: Choice = ALL) -> str:
    """One row per record that the chosen rows of the tables stand on; where a metric has intervals, their bounds follow
    it. Chosen columns are those of their metrics; what a row is stays.
    """
    records = [record for table in tables for row in choice.select_rows(table) for record in row.records]
    chosen = {name for table in tables for column in choice.select_columns(table.measured) for name in column.metrics}
    bounded = {name for r in records for name, metric in r.metrics.items() if metric.low is not None}
    columns = [
        (name, part)
        for name in sorted({name for record in records for name in record.metrics}, key=natural_key)
        if not choice.columns or name in chosen
        for part in (("value", "low", "high") if name in bounded else ("value",))
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [name if part == "value" else f"{name}_{part}" for name, part in columns]
    writer.writerow([*START, *names, *END])
    for record in records:
        cell = record.cell
        start = (
            cell.suite, cell.suite_version, cell.recipe, cell.steps, cell.model, cell.seed, record.outcome,
            one_line(record.reason), str(record.simulated).lower(),
            get_machine(record) or cell.settings.get("machine"),
        )  # fmt: skip
        values = [_read(record.metrics.get(name), name, part) for name, part in columns]
        writer.writerow([*map(_guard, start), *values, *map(_guard, (cell.tier, record.name))])
    return out.getvalue()


def _guard(value: Any) -> Any:
    """Text behind an apostrophe where a spreadsheet would take it for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _read(metric: Metric | None, name: str, part: str) -> float | None:
    """The value or a bound, which never leaves what the metric can be, to ten digits; counts are exact."""
    number: float | None = getattr(metric, part, None)
    if number is None:
        return None
    if part != "value":
        least, most = get_limits(name)
        number = min(max(number, least), most)
    return number if number.is_integer() else float(f"{number:.10g}")
