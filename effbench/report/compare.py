"""Two rows compared item by item: what changed and how surely. Refused unless both were measured alike."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from effbench.core.errors import Usage
from effbench.core.usage import nearest
from effbench.records.reader import read_record
from effbench.records.record import Record, Unreadable
from effbench.report.differences import LEVEL, average_items, count_changes, estimate_difference, read_items
from effbench.report.groups import Row, group_records
from effbench.report.metrics import (
    TASKS,
    get_family,
    get_scale,
    natural_key,
    select_quality,
    select_tasks,
)
from effbench.report.pages import load
from effbench.report.text import DASH, markdown_table, one_line, places
from effbench.stats.paired import Estimate, holm

LEGEND = (
    "Paired by item; an item is averaged over the seeds of each side first. Accuracies in %. A perplexity is that of\n"
    "the mean log-likelihood, and the interval of its change is that of the ratio, at the geometric mean of both.\n"
    "p: McNemar's exact test for right and wrong answers, else Student's t, or a studentized bootstrap where fewer\n"
    f"than 30 items differ. *: at most {LEVEL} after Holm over the table."
)
LONGEST = 100  # characters of a name that are looked at
FEW = 20  # names that are worth listing
SEE = "; `effbench report` shows the recipes that have records"
HEADER = ("metric", "A", "B", "B - A", "95 % interval", "n", "lost, gained", "p", "p (Holm)")


@dataclasses.dataclass(frozen=True)
class Change:
    """One metric of two rows, in the units in which it is shown."""

    metric: str
    before: float
    after: float
    low: float | None  # bounds of after - before
    high: float | None
    test: Estimate  # of the differences per item; of logarithms for a perplexity

    @property
    def value(self) -> float:
        return self.after - self.before


def compare(before: Row, after: Row) -> str:
    """The comparison as a table with notes above and below. Raises `Usage` for rows not measured alike."""
    refuse(before, after)
    changes = list(compare_metrics(before.records, after.records))
    if not changes:
        raise Usage(f"{before.recipe} and {after.recipe}: no metric of both has results per item")
    adjusted = holm([change.test.p for change in changes])
    lines = [_write_line(before, after, change, p) for change, p in zip(changes, adjusted, strict=True)]
    return f"A: {_describe(before)}\nB: {_describe(after)}\n\n{markdown_table(HEADER, lines)}\n\n{LEGEND}"


def compare_metrics(before: Sequence[Record], after: Sequence[Record]) -> Iterator[Change]:
    """The change of every metric of quality whose items can be paired."""
    for metric in select_quality(set(before[0].metrics) & set(after[0].metrics)):
        test = estimate_difference(before, after, metric)
        if test is not None:
            with contextlib.suppress(OverflowError):  # a perplexity beyond all numbers
                yield _make_change(metric, _measure_level(before, metric), _measure_level(after, metric), test)


def _measure_level(records: Sequence[Record], metric: str) -> float:
    """The metric as the mean of its items, each averaged over the records; the logarithm for a perplexity."""
    parts = select_tasks(records[0].metrics) if metric == TASKS else [metric]
    means = [float(values.mean()) for part in parts if (values := average_items(records, part)) is not None]
    return math.fsum(means) / len(means)


def _make_change(metric: str, before: float, after: float, test: Estimate) -> Change:
    if get_family(metric) == "perplexity":
        middle = 2 * math.exp((before + after) / 2)
        before, after = math.exp(before), math.exp(after)
        low, high = (None if bound is None else middle * math.sinh(bound / 2) for bound in (test.low, test.high))
    else:
        before, after = get_scale(metric) * before, get_scale(metric) * after
        low, high = (None if bound is None else get_scale(metric) * bound for bound in (test.low, test.high))
    return Change(metric, before, after, low, high, test)


def find_rows(names: tuple[str, str], results: Path, suite: str | None) -> tuple[Row, Row]:
    """The rows of two record files or recipe names; names are looked up in the first table that has both.

    Raises `Usage`.
    """
    files = [_read_file(name) for name in names]
    if files[0] is not None and files[1] is not None:
        return files[0], files[1]
    known: set[str] = set()
    for table in group_records(load(results, suite)):
        rows = {row.recipe: row for row in table.rows} | {row.steps: row for row in table.rows if row.steps}
        known |= set(rows)
        before, after = (row or rows.get(name) for row, name in zip(files, names, strict=True))
        if before is not None and after is not None:
            return before, after
    for row, name in zip(files, names, strict=True):
        if row is None and name not in known:
            shown = name[:LONGEST]
            hint = nearest(shown, known) if len(known) <= FEW or get_close_matches(shown, known) else SEE
            raise Usage(f"{shown!r} is neither a record file nor a recipe with records{hint}")
    raise Usage(f"{names[0]} and {names[1]} were never measured alike: no table has both")


def refuse(before: Row, after: Row) -> None:
    """Raise `Usage` unless the two rows were measured alike."""
    pair = f"{before.recipe} and {after.recipe} cannot be compared"
    first, second = before.records[0], after.records[0]
    digests = first.cell.digests, second.cell.digests
    for what, left, right in (
        ("model", first.cell.model, second.cell.model),
        ("data", first.cell.data, second.cell.data),
        *((f"the {name} digest", digests[0].get(name), digests[1].get(name)) for name in ("model", "data", "tasks")),
    ):
        if left != right:
            raise Usage(f"{pair}: {what} is {left} for one and {right} for the other")
    for metric in sorted(set(first.protocols) & set(second.protocols), key=natural_key):
        left, right = first.protocols[metric], second.protocols[metric]
        if left != right and get_family(metric) in ("perplexity", "accuracy", "distance"):
            raise Usage(f"{pair}: {metric} was measured as {left!r} for one and as {right!r} for the other")


def _read_file(name: str) -> Row | None:
    """The row of a record's file; None for what is no file. Raises `Usage` for a file that is no record."""
    path = Path(name)
    try:
        if not path.is_file():
            return None
        return Row((read_record(path),))
    except OSError:
        return None  # no file can have such a name
    except (Unreadable, ValueError) as error:
        raise Usage(f"{path}: {error}") from None


def _describe(row: Row) -> str:
    cell = row.records[0].cell
    seeds = ", ".join(str(record.cell.seed) for record in row.records)
    what = row.recipe if row.recipe == row.steps or not row.steps else f"{row.recipe} = {row.steps}"
    outcome = "" if row.worst.outcome == "ok" else f"; {row.worst.outcome}: {one_line(row.worst.reason)}"
    where = f"{cell.suite} v{cell.suite_version}, {cell.tier} tier, model {cell.model}, seed {seeds}"
    return f"{what} ({where}{outcome})"


def _write_line(before: Row, after: Row, change: Change, adjusted: float) -> list[str]:
    """One metric's line of the table; both sides have the decimals of their difference."""
    decimals = max(2, 2 - math.floor(math.log10(abs(change.value) or 1)))
    interval = DASH
    if change.low is not None and change.high is not None:
        if change.high > change.low:
            digits = 1 - math.floor(math.log10(abs(change.value) or 1))  # two of the difference itself
            decimals = min(9, max(2, places(change.high - change.low), digits))
        interval = f"{change.low:+.{decimals}f} to {change.high:+.{decimals}f}"
    return [
        change.metric,
        f"{change.before:.{decimals}f}",
        f"{change.after:.{decimals}f}",
        f"{change.value:+.{decimals}f}",
        interval,
        str(change.test.n),
        _count_changes(before, after, change.metric),
        f"{change.test.p:.2g}",
        f"{adjusted:.2g}{' *' if adjusted <= LEVEL else ''}",
    ]


def _count_changes(before: Row, after: Row, metric: str) -> str:
    """Right answers lost and gained, where one seed stands against one."""
    if get_family(metric) != "accuracy" or len(before.records) > 1 or len(after.records) > 1:
        return DASH
    left, right = read_items(before.records[0], metric), read_items(after.records[0], metric)
    if left is None or right is None:
        return DASH
    lost, gained = count_changes(left, right)
    return f"{lost}, {gained}"
