"""Records sorted into rows and tables: what may be compared stands in one table.

That is equal suite version, tier, model, data, settings and host. Everything else gets a table of its own. A row
that is not `ok` on every seed says so, and has a number only where every seed has it: never a mean over the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effbench.records.record import OUTCOMES, Cell, Record
from effbench.report.metrics import natural
from effbench.report.text import DASH, one_line
from effbench.stats.paired import Estimate, over_seeds

OF_A_ROW = ("method", "methods", "files")  # digests that differ between the rows of a table


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe: its records, one per seed."""

    records: tuple[Record, ...]

    @functools.cached_property
    def recipe(self) -> str:
        """Its name, the latest one where it was renamed between seeds."""
        return max(self.records, key=lambda record: record.started).cell.recipe

    @property
    def steps(self) -> str:
        return self.records[0].cell.steps

    @property
    def is_baseline(self) -> bool:
        return not self.steps

    @property
    def simulated(self) -> bool:
        return any(record.simulated for record in self.records)

    @property
    def densified(self) -> bool:
        """Whether a merge gave up zeros that pruning had made."""
        return any("densified" in record.log for record in self.records)

    @functools.cached_property
    def worst(self) -> Record:
        """The record whose outcome the row shows: last in the order of OUTCOMES, so `ok` only if all are."""
        return max(self.records, key=lambda record: OUTCOMES.index(record.outcome))

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the records and of the values in them."""
        records = [(one.cell.identity, one.attempt, one.started, _values(one)) for one in self.records]
        return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()[:12]

    def estimate(self, metric: str) -> Estimate | None:
        """The metric over the seeds, or None where any seed lacks it: no mean over a shrunken set.

        A single seed has the interval of its own items; several have that of the seeds.
        """
        if metric not in self._estimates:
            self._estimates[metric] = self._estimate(metric)
        return self._estimates[metric]

    @functools.cached_property
    def _estimates(self) -> dict[str, Estimate | None]:
        return {}

    def _estimate(self, metric: str) -> Estimate | None:
        measured = [record.metrics[metric] for record in self.records if metric in record.metrics]
        if len(measured) < len(self.records):
            return None
        if len(measured) == 1:
            return Estimate(measured[0].value, measured[0].low, measured[0].high)
        return over_seeds([one.value for one in measured])

    def fact(self, name: str) -> str:
        """What the methods of the recipe declare."""
        return one_line(self.records[0].facts.get(name) or "") or DASH


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows that may be compared, baseline first."""

    rows: tuple[Row, ...]
    older: int = 0  # records left out because newer ones took their place

    @functools.cached_property
    def records(self) -> list[Record]:
        return [record for row in self.rows for record in row.records]

    @property
    def cell(self) -> Cell:
        """The first cell: all cells of a table have its suite, tier, model, data and settings."""
        return self.rows[0].records[0].cell

    @property
    def baseline(self) -> Row | None:
        return self.rows[0] if self.rows[0].is_baseline else None

    @functools.cached_property
    def host(self) -> str:
        """Where all of it was measured; empty when no record says."""
        return next(filter(None, map(host, self.records)), "")

    @functools.cached_property
    def measured(self) -> tuple[str, ...]:
        """Names of all metrics that some record has, in natural order."""
        return tuple(sorted({name for record in self.records for name in record.metrics}, key=natural))

    def metrics(self, pattern: str | re.Pattern[str]) -> list[str]:
        """Names of measured metrics in which the pattern is found, in natural order."""
        return [name for name in self.measured if re.search(pattern, name)]


def group_records(records: Iterable[Record]) -> list[Table]:
    """Records sorted into what may be compared: newest suite version first, full tier before quick.

    Of two records of one recipe and seed that differ in nothing a reader sees (another state of the source,
    the model or the data) the newer one counts, and neither a row nor a table mixes the two.
    """
    placed = [(_place(record), record) for record in sorted(records, key=lambda record: (record.started, record.name))]
    hosts = {place: host(record) for place, record in placed if host(record)}
    tables: dict[tuple[Any, ...], list[Record]] = {}
    for place, record in placed:
        # A worker that died early leaves no environment: its record belongs where the others of its kind are.
        tables.setdefault((*place, host(record) or hosts.get(place, "")), []).append(record)
    return [_newest(tables[place]) for place in sorted(tables)]


def _newest(records: Sequence[Record]) -> Table:
    """The newest state of each row; `records` are sorted by age."""
    newest = state(records[-1])
    rows: dict[str, dict[int, Record]] = {}  # by what was run: the records by seed
    holders: dict[tuple[str, str], str] = {}  # by name and by steps: the row that had them last
    for record in records:
        if state(record) != newest:
            continue
        key = _key(record)
        for label in _labels(record):
            holder = holders.get(label, key)
            # Another row that still has this name or these steps: the record takes its place.
            if holder != key and any(label in _labels(other) for other in rows.get(holder, {}).values()):
                del rows[holder]
            holders[label] = key
        rows.setdefault(key, {})[record.cell.seed] = record
    sorted_rows = [Row(tuple(record for _, record in sorted(row.items()))) for row in rows.values()]
    sorted_rows.sort(key=lambda row: (not row.is_baseline, natural(row.recipe)))
    return Table(tuple(sorted_rows), len(records) - sum(len(row.records) for row in sorted_rows))


def _key(record: Record) -> str:
    """What the seeds of one row share, within a table."""
    cell = record.cell
    return json.dumps([cell.steps, cell.resolved, cell.digests], sort_keys=True, default=str)


def _labels(record: Record) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("name", record.cell.recipe), ("steps", record.cell.steps)


def _place(record: Record) -> tuple[Any, ...]:
    """Where a record belongs as far as a reader sees it, but for the host; sorts as tables are shown."""
    cell = record.cell
    chosen = {name: value for name, value in cell.settings.items() if value is not None}  # None: the default
    settings = json.dumps(chosen, sort_keys=True, default=str)
    return (
        cell.suite, -cell.suite_version, cell.tier != "full", cell.tier, cell.model != "tiny", cell.model,
        cell.data, settings,
    )  # fmt: skip


def state(record: Record) -> dict[str, str]:
    """Digests of what all rows of a table share."""
    return {name: value for name, value in record.cell.digests.items() if name.partition(".")[0] not in OF_A_ROW}


def machine(record: Record) -> str:
    """The device a record was measured on, in words; empty when the record does not say."""
    return one_line(record.environment.get("machine") or "")


def _values(record: Record) -> dict[str, float]:
    return {name: metric.value for name, metric in record.metrics.items()}


def host(record: Record) -> str:
    """The machine itself, of which there may be many alike; the kind of machine where the record says no more."""
    return one_line(record.environment.get("host") or "") or machine(record)


def differing_settings(tables: Sequence[Table]) -> list[str]:
    """Names of the settings in which the tables differ."""
    settings: list[Mapping[str, Any]] = [table.cell.settings for table in tables]
    names = sorted({name for one in settings for name in one})
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]
