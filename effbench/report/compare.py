"""Two rows compared item by item: what changed and how surely. Refused unless both were measured alike."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from decimal import Context, Decimal
from difflib import get_close_matches
from pathlib import Path

from effbench.core.errors import Usage
from effbench.core.usage import nearest
from effbench.records.reader import read_record
from effbench.records.record import Record, Unreadable
from effbench.report.differences import (
    ANSWERED,
    LEVEL,
    TESTED,
    Pairs,
    Side,
    average_items,
    count_changes,
    estimate_difference,
    read_items,
)
from effbench.report.groups import Row, Table, find_place, group_records
from effbench.report.metrics import (
    TASKS,
    get_family,
    get_limits,
    get_scale,
    natural_key,
    select_quality,
    select_tasks,
)
from effbench.report.pages import load
from effbench.report.text import DASH, markdown_table, one_line, places
from effbench.stats.paired import ENOUGH, Estimate, holm

LEGEND = (
    "Paired by item; an item is averaged over the seeds of each side first. Accuracies in %. A perplexity is that of\n"
    "the mean log-likelihood, and the interval of its change is that of the ratio, at the geometric mean of both.\n"
    "p: McNemar's exact test for right and wrong answers, whose interval is Tango's; Student's t of the\n"
    f"differences for windows and texts, and for other items, or a studentized bootstrap where fewer than {ENOUGH} of\n"
    f"them differ. *: at most {LEVEL} after Holm over the table."
)
LONGEST = 100  # characters of a name that are looked at
FEW = 20  # names that are worth listing
SHOWN = 3  # records of a name that are described
SEE = "; `effbench report` shows the recipes that have records"
EXACT = Context(prec=999)  # digits of the largest number that a double holds, and its decimals
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
    """The comparison as a table with notes above and below. Raises `Usage` for rows that cannot be compared."""
    changes = [] if find_obstacle(before, after) else list(compare_metrics(before.records, after.records))
    if not changes:
        raise Usage(_explain((before.recipe, after.recipe), ([before], [after]), find_obstacle(before, after)))
    adjusted = holm([change.test.p for change in changes])
    lines = [_write_line(before, after, change, p) for change, p in zip(changes, adjusted, strict=True)]
    sides = "\n".join([f"A: {_describe(before)}", f"B: {_describe(after)}", *_list_settings(before, after)])
    return f"{sides}\n\n{markdown_table(HEADER, lines)}\n\n{LEGEND}"


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
        least, most = get_limits(metric)
        reach = most - least  # no two values are further apart
        low, high = (
            None if bound is None else get_scale(metric) * min(max(bound, -reach), reach)
            for bound in (test.low, test.high)
        )
    return Change(metric, before, after, low, high, test)


def find_rows(names: tuple[str, str], results: Path, suite: str | None) -> tuple[Row, Row]:
    """The rows of two record files or recipe names. A name may have rows in several tables: the pair is taken that
    can be compared best, as `_rank` says.

    Raises `Usage`.
    """
    files = [_read_file(name) for name in names]
    tables = group_records(load(results, suite)) if None in files else []
    left, right = (_look_up(name, tables) if row is None else [row] for row, name in zip(files, names, strict=True))
    before, after = max(itertools.product(left, right), key=lambda pair: _rank(*pair))
    if not _count_shared(before, after):
        raise Usage(_explain(names, (left, right), find_obstacle(before, after)))
    return before, after


def _look_up(name: str, tables: Sequence[Table]) -> list[Row]:
    """The rows of a recipe. Raises `Usage` where there is none."""
    rows = [row for table in tables for row in table.rows]
    if found := [row for row in rows if name and name in (row.recipe, row.steps)]:
        return found
    known = {label for row in rows for label in (row.recipe, row.steps) if label}
    shown = name[:LONGEST]
    hint = nearest(shown, known) if len(known) <= FEW or get_close_matches(shown, known) else SEE
    raise Usage(f"{shown!r} is neither a record file nor a recipe with records{hint}")


def _rank(before: Row, after: Row) -> tuple[bool, bool, bool, int]:
    """How well two rows can be compared: at all, both of them `ok`, with equal settings, in how many metrics."""
    shared = _count_shared(before, after)
    equal = find_place(before.records[0]) == find_place(after.records[0])
    return shared > 0, before.worst.outcome == after.worst.outcome == "ok", equal, shared


def _count_shared(before: Row, after: Row) -> int:
    """How many metrics of two rows can be compared."""
    if find_obstacle(before, after):
        return 0
    pairs = Pairs(Side(before.records), Side(after.records))
    common = set(before.records[0].metrics) & set(after.records[0].metrics)
    return sum(bool(pairs.find(metric)) for metric in select_quality(common))


def find_obstacle(before: Row, after: Row) -> str:
    """In what two rows were not measured alike; empty where they were."""
    first, second = before.records[0], after.records[0]
    digests = first.cell.digests, second.cell.digests
    for what, left, right in (
        ("model", first.cell.model, second.cell.model),
        ("data", first.cell.data, second.cell.data),
        *((f"the {name} digest", digests[0].get(name), digests[1].get(name)) for name in ("model", "data", "tasks")),
    ):
        if left != right:
            return f"{what} is {left} for one and {right} for the other"
    for metric in sorted(set(first.protocols) & set(second.protocols), key=natural_key):
        left, right = first.protocols[metric], second.protocols[metric]
        if left != right and get_family(metric) in (*TESTED, "distance"):
            return f"{metric} was measured as {left!r} for one and as {right!r} for the other"
    return ""


def _explain(names: Sequence[str], sides: Sequence[Sequence[Row]], obstacle: str) -> str:
    """Why rows of two names cannot be compared, which there are, and the mend."""
    first, second = (name[:LONGEST] for name in names)
    why = obstacle or "no metric of both has results per item"
    there = [
        f"{name} has {'; '.join([*map(_tell_content, rows[:SHOWN]), *(['more'] if len(rows) > SHOWN else [])])}"
        for name, rows in zip((first, second), sides, strict=True)
    ]
    suite = sides[0][0].records[0].cell.suite
    mend = f"measure both in one `effbench run suite={suite}`, or name two files of records"
    return f"{first} and {second} cannot be compared: {why}. {'. '.join(there)}. Mend: {mend}"


def _tell_content(row: Row) -> str:
    """Where a row was measured, and how it failed or which metrics have results per item."""
    cell, worst = row.records[0].cell, row.worst
    where = f"{cell.suite} v{cell.suite_version}, {cell.tier} tier, model {cell.model}"
    if worst.outcome != "ok":
        return f"{where}: {worst.outcome} ({one_line(worst.reason)[:LONGEST] or 'no reason given'})"
    pairs = Pairs(Side(row.records), Side(row.records))
    names = [name for name in select_quality(row.records[0].metrics) if pairs.find(name)]
    return f"{where}: {', '.join(names)[:LONGEST] or 'no results per item'}"


def _list_settings(before: Row, after: Row) -> list[str]:
    """The settings in which two rows differ, as a line; none where they are equal."""
    left, right = before.records[0].cell.settings, after.records[0].cell.settings
    differing = [
        f"{name} {left.get(name)} and {right.get(name)}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]
    return [f"Settings of A and B differ: {one_line(differing)}"] if differing else []


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
    """One metric's line of the table; both sides have the decimals of their difference, which is that of the numbers
    printed.
    """
    decimals = max(2, 2 - math.floor(math.log10(abs(change.value) or 1)))
    interval = DASH
    if change.low is not None and change.high is not None:
        if change.high > change.low:
            digits = 1 - math.floor(math.log10(abs(change.value) or 1))  # two of the difference itself
            decimals = min(9, max(2, places(change.high - change.low), digits))
        interval = f"{change.low:+.{decimals}f} to {change.high:+.{decimals}f}"
    left, right = (f"{value:.{decimals}f}" for value in (change.before, change.after))
    return [
        change.metric,
        left,
        right,
        f"{EXACT.subtract(Decimal(right), Decimal(left)):+f}",
        interval,
        str(change.test.n),
        _count_changes(before, after, change.metric),
        f"{change.test.p:.2g}",
        f"{adjusted:.2g}{' *' if adjusted <= LEVEL else ''}",
    ]


def _count_changes(before: Row, after: Row, metric: str) -> str:
    """Right answers lost and gained, where one seed stands against one."""
    if get_family(metric) not in ANSWERED or len(before.records) > 1 or len(after.records) > 1:
        return DASH
    left, right = read_items(before.records[0], metric), read_items(after.records[0], metric)
    if left is None or right is None:
        return DASH
    lost, gained = count_changes(left, right)
    return f"{lost}, {gained}"
