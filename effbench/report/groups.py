"""Records sorted into rows and tables: what may be compared stands in one table.

That is equal suite version, tier, model, data, settings and host; what a row was tuned over is its own. Everything else
gets a table of its own. A row
that is not `ok` on every seed says so, and has a number only where every seed has it: never a mean over the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effbench.records.metric import Metric
from effbench.records.record import OUTCOMES, Cell, Record
from effbench.report.metrics import get_family, natural_key
from effbench.report.text import DASH, one_line
from effbench.stats.paired import Estimate, over_seeds

OF_A_ROW = ("method", "methods", "files")  # digests that differ between the rows of a table
OF_A_HOST = ("memory", "speed", "energy", "cost", None)  # kinds of metrics that say nothing of another host
OF_ROWS = ("host", "tune")  # settings in which the rows of a table may differ


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe: its records, one per seed."""

    records: tuple[Record, ...]
    elsewhere: bool = False  # measured on another host than the rows beside it

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

    @functools.cached_property
    def simulated(self) -> bool:
        return any(record.simulated for record in self.records)

    @functools.cached_property
    def verdict(self) -> str:
        """Whether its kernels are those that it claims: the worst of its records."""
        found = {_read_verdict(record) for record in self.records}
        return next((verdict for verdict in ("simulated", "fallback", "proven") if verdict in found), "")

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
        records = [(one.cell.identity, one.attempt, one.started, _list_values(one)) for one in self.records]
        return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()[:12]

    def estimate(self, metric: str) -> Estimate | None:
        """The metric over the seeds, or None where any seed lacks it: no mean over a shrunken set.

        A single seed has the interval of its own items; several have that of the seeds.
        """
        if len(self.records) == 1:
            single = self.records[0].metrics.get(metric)
            return None if single is None else Estimate(single.value, single.low, single.high)
        values = [one.value for record in self.records if (one := record.metrics.get(metric))]
        return over_seeds(values) if len(values) == len(self.records) else None

    def found(self, metric: str, finding: str) -> bool:
        """Whether the metric turned out so for any seed."""
        metrics = [record.metrics.get(metric) for record in self.records]
        return any(one is not None and bool(one.findings.get(finding)) for one in metrics)

    @property
    def learning_rates(self) -> list[float]:
        """The peaks of its fits: those that were chosen, where a fit tried several."""
        fits = [fits for record in self.records if isinstance(fits := record.log.get("fits"), list)]
        rates = [fit.get("lr") for fit in itertools.chain(*fits) if isinstance(fit, dict)]
        return sorted({rate for rate in rates if isinstance(rate, float)})

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader has to know of the methods of the recipe."""
        told = self.records[0].facts.get("caveats")
        return tuple(map(one_line, told)) if isinstance(told, list) else ()

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
        """A cell measured here: all cells of a table have its suite, tier, model, data and settings."""
        return next(row for row in self.rows if not row.elsewhere).records[0].cell

    @property
    def baseline(self) -> Row | None:
        return self.rows[0] if self.rows[0].is_baseline else None

    @functools.cached_property
    def host(self) -> str:
        """Where all of it was measured; empty when no record says."""
        here = (record for row in self.rows if not row.elsewhere for record in row.records)
        return next(filter(None, map(get_host, here)), "")

    @functools.cached_property
    def measured(self) -> tuple[str, ...]:
        """Names of all metrics that some record has, in natural order."""
        return tuple(sorted({name for record in self.records for name in record.metrics}, key=natural_key))

    def metrics(self, pattern: str | re.Pattern[str]) -> list[str]:
        """Names of measured metrics in which the pattern is found, in natural order."""
        return [name for name in self.measured if re.search(pattern, name)]


def group_records(records: Iterable[Record]) -> list[Table]:
    """Records sorted into what may be compared: newest suite version first, full tier before quick.

    Of two records of one recipe and seed that differ in nothing a reader sees (another state of the source,
    the model or the data) the newer one counts, and neither a row nor a table mixes the two.
    """
    placed = [
        (find_place(record), record) for record in sorted(records, key=lambda record: (record.started, record.name))
    ]
    hosts = {place: get_host(record) for place, record in placed if get_host(record)}
    tables: dict[tuple[Any, ...], list[Record]] = {}
    for place, record in placed:
        # A worker that died early leaves no environment: its record belongs where the others of its kind are.
        tables.setdefault((*place, get_host(record) or hosts.get(place, "")), []).append(record)
    return _share_baselines({place: _take_newest(tables[place]) for place in sorted(tables)})


def _share_baselines(tables: Mapping[tuple[Any, ...], Table]) -> list[Table]:
    """Give tables without a baseline that of another host, without what only holds there.

    Quality and size do not depend on the host. What is left of the other host, if no other row is, goes.
    """
    donors = {place[:-1]: table for place, table in tables.items() if table.baseline is not None}
    borrowers = {
        place: donors[place[:-1]]
        for place, table in tables.items()
        if table.baseline is None and place[:-1] in donors and _share_state(table, donors[place[:-1]])
    }
    shared = []
    for place, table in tables.items():
        if place in borrowers:
            baseline = borrowers[place].rows[0]
            records = tuple(dataclasses.replace(one, metrics=_drop_host(one.metrics)) for one in baseline.records)
            table = dataclasses.replace(table, rows=(Row(records, elsewhere=True), *table.rows))
        if len(table.rows) > 1 or table not in borrowers.values():
            shared.append(table)
    return shared


def _share_state(table: Table, other: Table) -> bool:
    return get_state(table.records[0]) == get_state(other.records[0])


def _drop_host(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics that do not depend on the host."""
    return {name: metric for name, metric in metrics.items() if get_family(name) not in OF_A_HOST}


def _take_newest(records: Sequence[Record]) -> Table:
    """The newest state of each row; `records` are sorted by age."""
    newest = get_state(records[-1])
    rows: dict[str, dict[int, Record]] = {}  # by what was run: the records by seed
    holders: dict[tuple[str, str], str] = {}  # by name and by steps: the row that had them last
    for record in records:
        if get_state(record) != newest:
            continue
        key = _make_key(record)
        for label in _list_labels(record):
            holder = holders.get(label, key)
            # Another row that still has this name or these steps: the record takes its place.
            if holder != key and any(label in _list_labels(other) for other in rows.get(holder, {}).values()):
                del rows[holder]
            holders[label] = key
        rows.setdefault(key, {})[record.cell.seed] = record
    sorted_rows = [Row(tuple(record for _, record in sorted(row.items()))) for row in rows.values()]
    sorted_rows.sort(key=lambda row: (not row.is_baseline, natural_key(row.recipe)))
    return Table(tuple(sorted_rows), len(records) - sum(len(row.records) for row in sorted_rows))


def _make_key(record: Record) -> str:
    """What the seeds of one row share, within a table."""
    cell = record.cell
    return json.dumps([cell.steps, cell.resolved, cell.digests, _list_points(cell)], sort_keys=True, default=str)


def _list_labels(record: Record) -> tuple[tuple[str, str], tuple[str, str]]:
    cell = record.cell
    return ("name", cell.recipe), ("steps", "; ".join([cell.steps, *_list_points(cell)]))


def _list_points(cell: Cell) -> list[str]:
    """The settings that a row is the best of; none where it is not tuned."""
    return list(cell.settings.get("tune") or ())


def find_place(record: Record) -> tuple[Any, ...]:
    """Where a record belongs as far as a reader sees it, but for the host; sorts as tables are shown."""
    cell = record.cell
    # None is the default of a setting.
    chosen = {name: value for name, value in cell.settings.items() if value is not None and name not in OF_ROWS}
    settings = json.dumps(chosen, sort_keys=True, default=str)
    return (
        cell.suite, -cell.suite_version, cell.tier != "full", cell.tier, cell.model != "tiny", cell.model,
        cell.data, settings,
    )  # fmt: skip


def get_state(record: Record) -> dict[str, str]:
    """Digests of what all rows of a table share."""
    return {name: value for name, value in record.cell.digests.items() if name.partition(".")[0] not in OF_A_ROW}


def get_machine(record: Record) -> str:
    """The device a record was measured on, in words; empty when the record does not say."""
    return one_line(record.environment.get("machine") or "")


def _list_values(record: Record) -> dict[str, float]:
    return {name: metric.value for name, metric in record.metrics.items()}


def _read_verdict(record: Record) -> str:
    """The verdict of its trace; of a record without one, what dispatch alone says."""
    proof = record.log.get("proof")
    if isinstance(proof, dict) and isinstance(proof.get("verdict"), str):
        return str(proof["verdict"])
    if record.simulated:
        return "simulated"
    return "fallback" if any("reference" in backends for backends in record.kernels.values()) else ""


def get_host(record: Record) -> str:
    """The machine itself, of which there may be many alike; the kind of machine where the record says no more."""
    return one_line(record.environment.get("host") or "") or get_machine(record)


def find_differing_settings(tables: Sequence[Table]) -> list[str]:
    """Names of the settings in which the tables differ."""
    settings: list[Mapping[str, Any]] = [table.cell.settings for table in tables]
    names = sorted({name for one in settings for name in one} - {"tune"})
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]
