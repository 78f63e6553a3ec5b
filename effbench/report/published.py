"""Own rows beside the published ones: does the quality reproduce, and how fast is it here?

A metric reproduces when it is within 0.1 % of the published value (an accuracy within 0.1 percentage points) or when
the 95 % interval of the paired difference, over the items that both sides measured, includes zero. A row reproduces
when all its metrics of quality and size do. Rows that were not measured alike are not compared.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effbench.core.paths import PUBLISHED
from effbench.records.record import PLACE, Record
from effbench.records.store import Store, latest
from effbench.report.differences import estimate_difference
from effbench.report.groups import Row, Table, get_machine, group_records
from effbench.report.metrics import (
    get_family,
    get_scale,
    get_title,
    select,
    select_perplexities,
    select_quality,
)
from effbench.report.sheets import Grid, Sheet, Stale, make_sheets
from effbench.report.text import DASH, rounded
from effbench.stats.paired import Estimate

DETAIL = "published"  # the grid of this module
TOLERANCE = 0.001  # of the published value; of one, for an accuracy
MEANINGS = {  # of the columns that only this grid has
    "quality": "Whether all metrics of quality and size equal those of the published row within 0.1 % or chance.",
    "published": "The published value of the column to the left.",
    "prefill here / published": "Tokens per second of prefill over those of the published row.",
    "decode here / published": "Tokens per second of decoding over those of the published row.",
}
SIZES = ("bits_per_weight", "stored_bytes")
INSTRUMENT = re.compile(r"(speed|memory|energy|flops)_")  # settings of instruments that do not measure quality


@dataclasses.dataclass(frozen=True)
class Difference:
    """A metric that does not reproduce."""

    metric: str
    own: float
    published: float
    test: Estimate | None  # of the difference per item, of the logarithm for a perplexity; None without items

    def __str__(self) -> str:
        own, published = (rounded(value * get_scale(self.metric), 4) for value in (self.own, self.published))
        return f"{get_title(self.metric)} {own} here, {published} published{self._interval}"

    @property
    def _interval(self) -> str:
        if self.test is None or self.test.low is None or self.test.high is None:
            return ""
        bounds = (self.test.low, self.test.high)
        if get_family(self.metric) == "perplexity":
            low, high = (f"{100 * math.expm1(min(bound, 700)):+.2g} %" for bound in bounds)
        else:
            low, high = (f"{bound * get_scale(self.metric):+.2g}" for bound in bounds)
        return f" (95 % interval of the difference {low} to {high})"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one own row compares with the published one."""

    own: Row
    published: Row | None = None
    why: str = ""  # it is not comparable
    outcomes: str = ""  # how the outcomes differ
    differences: tuple[Difference, ...] = ()
    largest: float = 0.0  # of the relative differences of all metrics; absolute for accuracies
    speeds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # metric: own over published
    older: bool = False  # the published row was measured by an older source

    @property
    def comparable(self) -> bool:
        return self.published is not None and not self.why

    @property
    def reproduces(self) -> bool:
        return self.comparable and not self.differences and not self.outcomes

    def __str__(self) -> str:
        if self.published is None:
            return "not published"
        if self.why:
            return f"not comparable: {self.why}"
        if self.reproduces:
            return "reproduces"
        return "differs: " + "; ".join([*([self.outcomes] if self.outcomes else []), *map(str, self.differences)])

    def speed(self, phase: str) -> float | None:
        """Own over published tokens per second, at the first point that both have."""
        return next((ratio for name, ratio in self.speeds.items() if name.startswith(phase)), None)


def compare_with_published(
    records: Iterable[Record], published: Store | None = None, stale: Stale | None = None
) -> str:
    """How own records compare with the published ones of the same suites: a line per row that does not reproduce,
    and a summary. `published` is by default what came with the source; `stale` says which records are of an older one.
    """
    tables = group_records(records)
    published_tables = read_published({table.cell.suite for table in tables}, published)
    return "\n".join(summarise(table, judge_table(table, published_tables, stale)) for table in tables)


def read_published(suites: Iterable[str], published: Store | None = None) -> list[Table]:
    """The published tables of some suites; none where nothing came with the source."""
    if published is None:
        if PUBLISHED is None or not PUBLISHED.is_dir():
            return []
        published = Store(PUBLISHED)
    records = [record for suite in sorted(suites) for record in published.read(suite)[0]]
    return group_records(latest(records).values())


def judge_table(table: Table, published: Sequence[Table], stale: Stale | None = None) -> list[Verdict]:
    """A verdict per row of an own table."""
    cell = table.cell
    alike = [
        other
        for other in published
        if (other.cell.suite, other.cell.tier, other.cell.model) == (cell.suite, cell.tier, cell.model)
    ]
    by_steps: dict[str, list[Row]] = {}
    for other in alike:
        for row in other.rows:
            by_steps.setdefault(row.steps, []).append(row)
    return [_judge_best(row, by_steps.get(row.steps, []), stale) for row in table.rows]


def _judge_best(row: Row, candidates: Sequence[Row], stale: Stale | None) -> Verdict:
    """The verdict on the first candidate that is comparable, else on the first."""
    verdicts = [judge(row, candidate, stale) for candidate in candidates]
    return next((verdict for verdict in verdicts if verdict.comparable), verdicts[0] if verdicts else Verdict(row))


def judge(own: Row, published: Row, stale: Stale | None = None) -> Verdict:
    """How a row compares with the published one of the same steps, on the seeds that both have."""
    older = stale is not None and any(map(stale, published.records))
    seeds = {record.cell.seed for record in own.records} & {record.cell.seed for record in published.records}
    here, there = (
        Row(tuple(record for record in row.records if record.cell.seed in seeds)) for row in (own, published)
    )
    why = find_obstacle(here, there)
    if why:
        return Verdict(own, published, why, older=older)
    differences: list[Difference] = []
    largest = 0.0
    for metric in _find_common(here, there):
        ours, theirs = _average(here, metric), _average(there, metric)
        distance = measure_distance(metric, ours, theirs)
        largest = max(largest, distance)
        if distance >= TOLERANCE:
            test = estimate_difference(there.records, here.records, metric)
            if test is None or test.low is None or test.high is None or not test.low <= 0 <= test.high:
                differences.append(Difference(metric, ours, theirs, test))
    outcomes = here.worst.outcome, there.worst.outcome
    return Verdict(
        own,
        published,
        outcomes="" if outcomes[0] == outcomes[1] else f"{outcomes[0]} here, {outcomes[1]} published",
        differences=tuple(differences),
        largest=largest,
        speeds=_compare_speeds(here, there),
        older=older,
    )


def find_obstacle(own: Row, published: Row) -> str:
    """Why two rows of the same steps cannot be compared; empty where they can."""
    if not own.records or not published.records:
        return "no seed in common"
    here, there = own.records[0], published.records[0]
    ours, theirs = here.cell, there.cell
    if ours.suite_version != theirs.suite_version:
        return f"version {ours.suite_version} of the suite here, {theirs.suite_version} published"
    if ours.data != theirs.data:
        return f"data {ours.data} here, {theirs.data} published"
    for name in ("model", "data", "tasks"):
        if ours.digests.get(name) != theirs.digests.get(name):
            return f"the content of the {name} is not the same"
    if ours.resolved != theirs.resolved:
        return "the method's parameters have other defaults"
    for name in sorted(ours.settings.keys() | theirs.settings.keys()):
        if name in (*PLACE, "probes") or INSTRUMENT.match(name):
            continue
        left, right = (_name_setting(cell.settings, name) for cell in (ours, theirs))
        if left != right:
            return f"{name} {left} here, {right} published"
    common = _find_common(own, published)
    if not common and own.worst.outcome == published.worst.outcome == "ok":
        return "no metric of quality in common"
    for metric in common:
        if here.protocols.get(metric) != there.protocols.get(metric):
            return f"{get_title(metric)} is measured by another protocol"
    return ""


def _name_setting(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name)
    return "default" if value is None else str(value)


def _find_common(own: Row, published: Row) -> list[str]:
    """Metrics of quality and size that every record of both rows has."""
    records = (*own.records, *published.records)
    names = set.intersection(*(set(record.metrics) for record in records))
    return [*select_quality(names), *(name for name in SIZES if name in names)]


def _average(row: Row, metric: str) -> float:
    return statistics.fmean(record.metrics[metric].value for record in row.records)


def measure_distance(metric: str, own: float, published: float) -> float:
    """Of accuracies absolute, else relative to the published value."""
    if get_family(metric) == "accuracy" or own == published:
        return abs(own - published)
    return abs(own / published - 1) if published else math.inf


def _compare_speeds(own: Row, published: Row) -> dict[str, float]:
    """Own over published tokens per second, where both timed in the same way."""
    ours, theirs = own.records[0].cell.settings, published.records[0].cell.settings
    names = {name for name in ours.keys() | theirs.keys() if name.startswith("speed_") and name != "speed_points"}
    if own.simulated or published.simulated or any(ours.get(name) != theirs.get(name) for name in names):
        return {}
    records = (*own.records, *published.records)
    common = set.intersection(*(set(record.metrics) for record in records))
    ratios = {}
    for name in select(common, "speed", "tokens/s"):
        theirs_mean = _average(published, name)
        if theirs_mean > 0:
            ratios[name] = _average(own, name) / theirs_mean
    return ratios


# ---- words --------------------------------------------------------------------------------------


def summarise(table: Table, verdicts: Sequence[Verdict]) -> str:
    """A line per row that does not reproduce, and one that sums all up."""
    cell = table.cell
    name = f"{cell.suite} v{cell.suite_version}, {cell.tier} tier, model {cell.model}"
    if all(verdict.published is None for verdict in verdicts):
        return f"{name}: nothing is published to compare with."
    return "\n".join([*(f"  {line}" for line in _explain(verdicts)), f"{name}: {_sum_up(verdicts)}"])


def _explain(verdicts: Sequence[Verdict]) -> list[str]:
    """A line per published row that does not reproduce; none where all have one reason, which the summary gives."""
    if _find_shared_reason(verdicts):
        return []
    return [f"{v.own.recipe} {v}" for v in verdicts if v.published is not None and not v.reproduces]


def _find_shared_reason(verdicts: Sequence[Verdict]) -> str:
    """Why rows are not comparable, where none is and all have one reason; else empty."""
    reasons = {verdict.why for verdict in verdicts if verdict.published is not None}
    return reasons.pop() if len(reasons) == 1 else ""


def _sum_up(verdicts: Sequence[Verdict]) -> str:
    comparable = [verdict for verdict in verdicts if verdict.comparable]
    good = [verdict for verdict in comparable if verdict.reproduces]
    counts = [f"{len(good)} of {_count_rows(len(verdicts))} reproduce the published quality"]
    if good:
        largest = max(verdict.largest for verdict in good)
        counts[0] += f" (largest difference {'0' if largest == 0 else f'{100 * largest:.1g}'} %)"
    apart = sum(bool(verdict.why) for verdict in verdicts)
    if shared := _find_shared_reason(verdicts):
        counts = [f"{_count_rows(apart)} cannot be compared with the published quality ({shared})"]
    for count, words in (
        (len(comparable) - len(good), "differ"),
        (0 if shared else apart, "not comparable"),
        (sum(verdict.published is None for verdict in verdicts), "not published"),
    ):
        if count:
            counts.append(f"{count} {words}")
    parts = [", ".join(counts)]
    for phase in ("prefill", "decode"):
        ratios = [ratio for verdict in comparable if (ratio := verdict.speed(phase)) is not None]
        if ratios:
            parts.append(f"{phase} runs at {rounded(statistics.median(ratios), 2)}× of the published speed")
    if places := {get_machine(record) for v in comparable if v.published for record in v.published.records} - {""}:
        parts.append(f"published on {', '.join(sorted(places))}")
    if older := sum(verdict.older for verdict in verdicts):
        parts.append(f"{_count_rows(older)} published from an older source")
    return "; ".join(parts) + "."


def _count_rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def make_published_sheets(
    records: Iterable[Record], published: Store | None = None, stale: Stale | None = None
) -> list[Sheet]:
    """A sheet per own table with the published numbers beside the own ones, and a verdict per row."""
    tables = group_records(records)
    published_tables = read_published({table.cell.suite for table in tables}, published)
    sheets = []
    for table, sheet in zip(tables, make_sheets(tables, stale=stale), strict=True):
        verdicts = judge_table(table, published_tables, stale)
        notes = _explain(verdicts)
        grid = _make_grid(table, verdicts)
        sheets.append(
            dataclasses.replace(sheet, grids=(grid,), notes=tuple(notes), legend=_sum_up(verdicts), metrics=())
        )
    return sheets


def _make_grid(table: Table, verdicts: Sequence[Verdict]) -> Grid:
    metrics = [*select_perplexities(table.measured)[:1], *(name for name in ("tasks_acc",) if name in table.measured)]
    header = ["recipe", "quality"]
    for metric in metrics:
        header += [get_title(metric), "published"]
    header += [f"{phase} here / published" for phase in ("prefill", "decode")]
    lines = []
    for verdict in verdicts:
        line = [verdict.own.recipe, str(verdict).partition(":")[0]]
        for metric in metrics:
            line += [_show_value(verdict.own, metric), _show_value(verdict.published, metric)]
        ratios = (verdict.speed(phase) for phase in ("prefill", "decode"))
        line += [DASH if ratio is None else f"{rounded(ratio)}×" for ratio in ratios]
        lines.append(tuple(line))
    return Grid(DETAIL, tuple(header), tuple(lines))


def _show_value(row: Row | None, metric: str) -> str:
    estimate = None if row is None else row.estimate(metric)
    return DASH if estimate is None else rounded(estimate.value * get_scale(metric), 4)
