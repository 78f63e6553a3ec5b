"""Two rows compared item by item: what changed and how surely. Refused unless both were measured alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effbench.core.errors import Usage
from effbench.core.usage import nearest
from effbench.records.reader import read_record
from effbench.records.record import Unreadable
from effbench.report.tables import ACCURACY, LEVEL, PPL, Row, groups, items, load, natural, paired, places, tasks
from effbench.report.text import DASH, markdown_table, rounded
from effbench.stats.paired import Estimate, holm

LEGEND = (
    "Paired by item. Accuracies in %, a change of perplexity in %. p: McNemar's exact test for one seed\n"
    f"of a task, a studentized bootstrap for the rest. *: at most {LEVEL} after Holm over the table."
)
DISTANCES = ("kl_nats_per_token", "top1_agreement")
HEADER = ("metric", "A", "B", "B - A", "95 % interval", "n", "lost, gained", "p", "p (Holm)")


def main(options: Mapping[str, Any]) -> int:
    """`effbench compare A B [suite=NAME] [results=DIR]`: paired tests per task, perplexity and distance.

    A and B are record files or names of recipes, of one suite where one is named. Raises `Usage` where they
    cannot be found, were not measured alike, or have nothing in common.
    """
    names = str(options["a"]), str(options["b"])
    before, after = sides(names, Path(options.get("results") or "results"), options.get("suite"))
    print(compare(before, after))
    return 0


def compare(before: Row, after: Row) -> str:
    """The comparison as a table with notes above and below. Raises `Usage` for rows not measured alike."""
    refuse(before, after)
    measured = set(before.records[0].metrics) & set(after.records[0].metrics)
    metrics = [
        *sorted(filter(PPL.search, measured), key=natural),
        *(name for name in DISTANCES if name in measured),
        *(["tasks_acc"] if "tasks_acc" in measured else []),
        *tasks(measured),
    ]
    found = {metric: test for metric in metrics if (test := paired(before.records, after.records, metric))}
    if not found:
        raise Usage(f"{before.recipe} and {after.recipe}: no metric of both has results per item")
    adjusted = holm([test.p for test in found.values()])
    tests = zip(found.items(), adjusted, strict=True)
    table = markdown_table(HEADER, [_line(before, after, metric, test, p) for (metric, test), p in tests])
    return f"A: {_named(before)}\nB: {_named(after)}\n\n{table}\n\n{LEGEND}"


def sides(names: tuple[str, str], results: Path, suite: str | None) -> tuple[Row, Row]:
    """The rows of two record files or recipe names; names are looked up in the first table that has both.

    Raises `Usage`.
    """
    given = [_file(Path(name)) if Path(name).is_file() else None for name in names]
    if given[0] is not None and given[1] is not None:
        return given[0], given[1]
    known: set[str] = set()
    for group in groups(load(results, suite)):
        rows = {row.recipe: row for row in group.rows} | {row.steps: row for row in group.rows if row.steps}
        known |= set(rows)
        before, after = (row or rows.get(name) for row, name in zip(given, names, strict=True))
        if before is not None and after is not None:
            return before, after
    for row, name in zip(given, names, strict=True):
        if row is None and name not in known:
            raise Usage(f"{name!r} is neither a record file nor a recipe with records{nearest(name, known)}")
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
    for metric in sorted(set(first.protocols) & set(second.protocols), key=natural):
        left, right = first.protocols[metric], second.protocols[metric]
        if left != right and (PPL.search(metric) or ACCURACY.search(metric) or metric in DISTANCES):
            raise Usage(f"{pair}: {metric} was measured as {left!r} for one and as {right!r} for the other")


def _file(path: Path) -> Row:
    try:
        return Row((read_record(path),))
    except Unreadable as error:
        raise Usage(f"{path}: {error}") from None


def _named(row: Row) -> str:
    cell = row.records[0].cell
    seeds = ", ".join(str(record.cell.seed) for record in row.records)
    what = row.recipe if row.recipe == row.steps or not row.steps else f"{row.recipe} = {row.steps}"
    outcome = "" if row.worst.outcome == "ok" else f"; {row.worst.outcome}: {row.worst.reason}"
    where = f"{cell.suite} v{cell.suite_version}, {cell.tier} tier, model {cell.model}, seed {seeds}"
    return f"{what} ({where}{outcome})"


def _line(before: Row, after: Row, metric: str, test: Estimate, adjusted: float) -> list[str]:
    """One metric's row of the table."""
    scale: Callable[[float], float]
    if PPL.search(metric):
        factor, scale = 1.0, lambda value: 100 * math.expm1(value)
    else:
        factor = 1.0 if metric == "kl_nats_per_token" else 100.0
        scale = factor.__mul__
    unit = " %" if PPL.search(metric) else ""
    values = [estimate.value * factor if (estimate := row.estimate(metric)) else None for row in (before, after)]
    change, interval = scale(test.value), DASH
    decimals = max(1, 2 - math.floor(math.log10(abs(change) or 1)))
    if test.low is not None and test.high is not None:
        low, high = scale(test.low), scale(test.high)
        decimals = places(high - low) if high > low else decimals
        interval = f"{low:+.{decimals}f} to {high:+.{decimals}f}{unit}"
    return [
        metric,
        *(DASH if value is None else rounded(value, 4) for value in values),
        f"{change:+.{decimals}f}{unit}",
        interval,
        str(test.n),
        _changed(before, after, metric),
        f"{test.p:.2g}",
        f"{adjusted:.2g}{' *' if adjusted <= LEVEL else ''}",
    ]


def _changed(before: Row, after: Row, metric: str) -> str:
    """Right answers lost and gained, where one seed stands against one."""
    if not ACCURACY.search(metric) or len(before.records) > 1 or len(after.records) > 1:
        return DASH
    left, right = items(before.records[0], metric), items(after.records[0], metric)
    if left is None or right is None:
        return DASH
    return f"{np.sum(right < left)}, {np.sum(right > left)}"
