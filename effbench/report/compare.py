"""Two rows compared, metric by metric: what changed and how surely. Refused unless both were measured alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from decimal import Context, Decimal
from typing import TYPE_CHECKING

from effbench.core.errors import Usage
from effbench.records.imported import is_imported
from effbench.report.changes import Change, Changes, find_changes
from effbench.report.differences import ANSWERED, LEVEL, TESTED, Pairs, Side, count_changes, read_items
from effbench.report.groups import Row, find_place
from effbench.report.metrics import get_family, get_unit, natural_key, select_quality
from effbench.report.text import DASH, LONGEST, bytes_text, markdown_table, one_line, places, rounded
from effbench.report.verdicts import Effects, judge
from effbench.stats.paired import ENOUGH, holm

if TYPE_CHECKING:  # sides are read by pages, whose blocks compare
    from effbench.report.sides import Rows

LEGEND = (
    "Paired by item; an item is averaged over the seeds of each side first. Accuracies in %. A perplexity is that of\n"
    "the mean log-likelihood, and the interval of its change is that of the ratio, at the geometric mean of both.\n"
    "p: McNemar's exact test for right and wrong answers, whose interval is Tango's; Student's t of the\n"
    f"differences for windows and texts, and for other items, or a studentized bootstrap where fewer than {ENOUGH} of\n"
    f"them differ. *: at most {LEVEL} after Holm over both tables."
)
RATIOS = (
    "B / A of speeds, sizes, energy and cost: of speed-ups in turns with the unchanged model, of what was timed alone\n"
    "and of the seeds by Yuen's test on logarithms, A and B being trimmed geometric means; what is counted has no\n"
    "chance in it."
)
DIGITS = 16  # of a digest
SHOWN = 3  # records of a name that are described
EXACT = Context(prec=999)  # digits of the largest number that a double holds, and its decimals
HEADER = ("metric", "A", "B", "B - A", "95 % interval", "n", "lost, gained", "p", "p (Holm)", "verdict")
HEADER_OF_RATIOS = ("metric", "A", "B", "B / A", "95 % interval", "basis", "p", "p (Holm)", "verdict")


def compare_rows(before: Row, after: Row) -> Changes:
    """All that changed. Raises `Usage` for rows that cannot be compared."""
    obstacle = find_obstacle(before, after)
    changes = Changes(()) if obstacle else find_changes(before, after)
    if not changes.found and not changes.equal:
        raise Usage(_explain((before.recipe, after.recipe), ([before], [after]), obstacle))
    return changes


def correct(changes: Sequence[Change]) -> list[float | None]:
    """p of each change after Holm's correction over all that was tested; None for what was counted."""
    adjusted = iter(holm([change.test.p for change in changes if change.basis != "count"]))
    return [None if change.basis == "count" else next(adjusted) for change in changes]


def write_comparison(before: Row, after: Row, changes: Changes, effects: Effects) -> str:
    """The comparison as tables with notes above and below."""
    lines: tuple[list[list[str]], list[list[str]]] = ([], [])
    for change, p in zip(changes.found, correct(changes.found), strict=True):
        verdict = judge(change.metric, change.test, p, effects)
        if change.relative:
            lines[1].append([*write_ratio(change), *write_chances(change, p), verdict])
        else:
            lines[0].append([*_write_line(before, after, change), *write_chances(change, p), verdict])
    sides = "\n".join([f"A: {_describe(before)}", f"B: {_describe(after)}", *_list_settings(before, after)])
    kinds = [kind for kind in zip(lines, (HEADER, HEADER_OF_RATIOS), (LEGEND, RATIOS), strict=True) if kind[0]]
    tables = [markdown_table(header, body) for body, header, _ in kinds]
    legends = [legend for *_, legend in kinds]
    return "\n\n".join([sides, *tables, "\n".join([*legends, write_effects(effects), *write_notes(changes)])])


def write_effects(effects: Effects) -> str:
    """What a verdict needs."""
    return (
        f"A verdict takes p (Holm) of at most {LEVEL} and {effects.relative:g} % of a speed, size or cost; of quality\n"
        f"{effects.quality:g} points of a share, {effects.quality:g} % of a perplexity, {effects.quality / 100:g} nats."
    )


def write_notes(changes: Changes) -> list[str]:
    """What the tables do not hold, and why."""
    told = [
        (changes.untested, "Measured once a side, so without a spread to judge by"),
        (changes.apart, "Of unlike protocols"),
        (changes.elsewhere, "Of two hosts, so not compared"),
    ]
    notes = [f"{why}: {', '.join(names)}." for names, why in told if names]
    return [*([f"Counted and equal: {changes.equal} metrics."] if changes.equal else []), *notes]


def find_pair(sides: tuple[Rows, Rows]) -> tuple[Row, Row]:
    """Of the rows that two names have, the pair that can be compared best, as `_rank` says. Raises `Usage`."""
    left, right = (side.found for side in sides)
    before, after = max(itertools.product(left, right), key=lambda pair: _rank(*pair))
    if not any(_count_shared(before, after)):
        names = sides[0].name, sides[1].name
        raise Usage(_explain(names, (left, right), find_obstacle(before, after)))
    return before, after


def _rank(before: Row, after: Row) -> tuple[bool, bool, bool, int, int]:
    """How well two rows can be compared: at all, both of them `ok`, with equal settings, in how many metrics."""
    quality, others = _count_shared(before, after)
    equal = find_place(before.records[0]) == find_place(after.records[0])
    return quality + others > 0, before.worst.outcome == after.worst.outcome == "ok", equal, quality, others


def _count_shared(before: Row, after: Row) -> tuple[int, int]:
    """How many metrics of quality can be compared, and how many others both rows have."""
    if find_obstacle(before, after):
        return 0, 0
    pairs = Pairs(Side(before.records), Side(after.records))
    common = set(before.records[0].metrics) & set(after.records[0].metrics)
    quality = select_quality(common)
    return sum(bool(pairs.find(metric)) for metric in quality), len(common) - len(quality)


def find_obstacle(before: Row, after: Row) -> str:
    """In what two rows were not measured alike; empty where they were."""
    first, second = before.records[0], after.records[0]
    digests = first.cell.digests, second.cell.digests
    if is_imported(first) != is_imported(second):
        return "one was imported from another tool and the other measured here"
    for what, left, right in (
        ("model", first.cell.model, second.cell.model),
        ("data", first.cell.data, second.cell.data),
        *(
            (f"the {name} digest", *(str(one.get(name))[:DIGITS] for one in digests))
            for name in ("model", "data", "tasks")
        ),
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
    why = obstacle or "no metric of both can be compared"
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


def _describe(row: Row) -> str:
    cell = row.records[0].cell
    seeds = ", ".join(str(record.cell.seed) for record in row.records)
    what = row.recipe if row.recipe == row.steps or not row.steps else f"{row.recipe} = {row.steps}"
    outcome = "" if row.worst.outcome == "ok" else f"; {row.worst.outcome}: {one_line(row.worst.reason)}"
    where = f"{cell.suite} v{cell.suite_version}, {cell.tier} tier, model {cell.model}, seed {seeds}"
    return f"{what} ({where}{outcome})"


def _write_line(before: Row, after: Row, change: Change) -> list[str]:
    """One metric of quality, with the items and the answers that changed."""
    return [change.metric, *write_difference(change), str(change.test.n), _count_changes(before, after, change.metric)]


def write_difference(change: Change) -> list[str]:
    """A, B, B - A and its interval; both sides have the decimals of their difference, which is that of the numbers
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
    return [left, right, f"{EXACT.subtract(Decimal(right), Decimal(left)):+f}", interval]


def write_ratio(change: Change) -> list[str]:
    """One metric that is compared by its ratio."""
    show = bytes_text if get_unit(change.metric) == "bytes" else lambda value: rounded(value, 4)
    interval = DASH
    if change.low is not None and change.high is not None:
        interval = f"{rounded(change.low)} to {rounded(change.high)}"
    ratio = rounded(change.value) if math.isfinite(change.value) else DASH
    return [change.metric, show(change.before), show(change.after), ratio, interval, change.basis]


def write_chances(change: Change, adjusted: float | None) -> list[str]:
    if adjusted is None:
        return [DASH, DASH]
    return [f"{change.test.p:.2g}", f"{adjusted:.2g}{' *' if adjusted <= LEVEL else ''}"]


def _count_changes(before: Row, after: Row, metric: str) -> str:
    """Right answers lost and gained, where one seed stands against one."""
    if get_family(metric) not in ANSWERED or len(before.records) > 1 or len(after.records) > 1:
        return DASH
    left, right = read_items(before.records[0], metric), read_items(after.records[0], metric)
    if left is None or right is None:
        return DASH
    lost, gained = count_changes(left, right)
    return f"{lost}, {gained}"
