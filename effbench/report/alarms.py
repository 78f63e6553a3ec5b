"""How often the tests of tables call equal sides different: comparisons of equal sides made of published results."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from effbench.core.provenance import strip_prose
from effbench.records.record import Record
from effbench.report.differences import (
    LEVEL,
    TESTED,
    Pairs,
    Side,
    compute_tests,
    estimate_difference,
    find_name,
    get_version,
    read_items,
)
from effbench.report.groups import Row, Table
from effbench.report.metrics import TASKS, get_family, select_quality
from effbench.report.text import markdown_table
from effbench.stats.paired import Floats

COMPARISONS = 1000
DRAWS = 20  # of each table as a whole

NAMES = {"perplexity": "perplexities", "accuracy": "tasks", "quality": "answers of a task learned"}
PAGE = """# How often equal sides are called different

The arrows of tables and the stars of `effbench compare` stand for differences that chance alone would show in {level}
of 100 comparisons of equal sides at most. Here it is counted, by the code that makes the tables, on the items of the
published records: windows, texts and questions as many, as hard and as far apart as they are.

{table}

**Exchanged:** of two rows, what both have of each item changes sides at a coin's toss. The two sides are equal then,
whatever they are made of.

**Whole tables:** what all rows of a table have of each item changes hands among them, {draws} times for each table.
An alarm is any arrow in all of the table.

**Gaps drawn anew:** the first row, and beside it the same with gaps that are drawn from those of two real rows, less
their mean. The two sides are unlike and equal in the mean alone. Where one text in forty is far from all others, a
sample of forty often lacks it, and neither Student's t nor a bootstrap knows. A small p of few texts is worth a look
at the texts.

p: the chance of so many alarms or more, were the rate {level} %, by the binomial distribution.
"""
Case = tuple[Record, Record, str]  # a baseline, a row beside it, and a metric of which both have items
Make = Callable[[Record, Record, Sequence[str], np.random.Generator], tuple[Record, Record]]


@dataclasses.dataclass
class Count:
    """How many comparisons there were, and in how many equal sides were called different."""

    made: int = 0
    alarms: int = 0

    def add(self, alarm: bool) -> None:
        """Count one comparison."""
        self.made += 1
        self.alarms += alarm

    @property
    def p(self) -> float:
        """The chance of so many alarms or more, were their rate the nominal one."""
        return float(binomtest(self.alarms, self.made, LEVEL, alternative="greater").pvalue) if self.made else 1.0


def swap(before: Record, after: Record, metrics: Sequence[str], rng: np.random.Generator) -> tuple[Record, Record]:
    """Two records that are equal but for chance: what two real ones have of an item changes sides at a coin's toss."""
    left, right = {}, {}
    for name in (find_name(before, metric) for metric in metrics):
        swapped = rng.random(len(before.samples[name])) < 0.5
        pairs = list(zip(before.samples[name], after.samples[name], swapped, strict=True))
        left[name] = [second if turned else first for first, second, turned in pairs]
        right[name] = [first if turned else second for first, second, turned in pairs]
    return dataclasses.replace(before, samples=left), dataclasses.replace(after, samples=right)


def recentre(before: Record, after: Record, metrics: Sequence[str], rng: np.random.Generator) -> tuple[Record, Record]:
    """Two records that differ item by item as two real ones do, and have one mean: gaps less their mean are drawn anew
    for each item. Where few texts are far from all others, no test of few items knows it from their sample."""
    left, right = {}, {}
    for metric in metrics:
        first, second = read_items(before, metric), read_items(after, metric)
        assert first is not None and second is not None  # as `_list_cases` found
        gaps = second - first
        left[metric] = first.tolist()
        right[metric] = (first + rng.choice(gaps - gaps.mean(), gaps.shape)).tolist()
    return dataclasses.replace(before, samples=left), dataclasses.replace(after, samples=right)


def count_alarms(
    tables: Sequence[Table], make: Make = swap, comparisons: int = COMPARISONS, seed: int = 0
) -> dict[str, Count]:
    """Alarms by kind of metric, over so many comparisons of one metric each; the kinds come in turns. Kinds of which no
    two rows have items are left out.
    """
    cases = [case for table in tables for case in _list_cases(table)]
    if make is recentre:  # answers have no mean of their own, and ratios have sizes
        cases = [case for case in cases if _has_plain_numbers(*case)]
    found = {family: [case for case in cases if get_family(case[2]) == family] for family in TESTED}
    found = {family: chosen for family, chosen in found.items() if chosen}
    rng = np.random.default_rng(seed)
    counts = {family: Count() for family in found}
    for _, (family, chosen) in zip(range(comparisons), itertools.cycle(found.items()), strict=False):
        before, after, metric = chosen[rng.integers(len(chosen))]
        left, right = make(before, after, _list_parts(before, metric), rng)
        test = estimate_difference([left], [right], metric)
        counts[family].add(test is not None and test.p <= LEVEL)
    return counts


def count_tables(tables: Sequence[Table], draws: int = DRAWS, seed: int = 0) -> Count:
    """Whole tables all of whose rows equal the baseline: in how many any difference stands after Holm's correction.

    What the records of a table have of each item changes hands among them.
    """
    rng, count = np.random.default_rng(seed), Count()
    for table in tables:
        cases = list(_list_cases(table))
        rows = list({one.name: one for before, after, _ in cases for one in (before, after)}.values())
        names = {find_name(before, part) for before, _, metric in cases for part in _list_parts(before, metric)}
        stacked = ((name, _stack([row.samples.get(name) for row in rows])) for name in sorted(names))
        items = {name: values for name, values in stacked if values is not None}
        for _ in range(draws if items else 0):
            drawn = {name: rng.permuted(values, axis=0) for name, values in items.items()}
            equal = [
                dataclasses.replace(row, samples={name: values[i].tolist() for name, values in drawn.items()})
                for i, row in enumerate(rows)
            ]
            tests = compute_tests(Table(tuple(Row((record,)) for record in equal)))
            count.add(any(test.p <= LEVEL for test in tests.values()))
    return count


def write_page(tables: Sequence[Table], present: str = "") -> str:
    """The page of the documentation, in Markdown; the present one where it is of these records and these statistics."""
    stamp = f"<!-- Generated by `effbench report --write` from {digest(tables)}; do not edit. -->"
    if present.startswith(stamp):
        return present
    counts, skewed, whole = count_alarms(tables), count_alarms(tables, recentre), count_tables(tables)
    rows = [*((f"{NAMES[family]}, exchanged", count) for family, count in counts.items())]
    together = Count(sum(count.made for count in counts.values()), sum(count.alarms for count in counts.values()))
    rows += [("together", together), ("whole tables, after Holm", whole)]
    rows += [(f"{NAMES[family]}, gaps drawn anew", count) for family, count in skewed.items()]
    header = ("compared", "comparisons", "alarms", "rate, %", "p of a rate above 5 %")
    lines = [
        (name, str(c.made), str(c.alarms), f"{100 * c.alarms / max(c.made, 1):.1f}", f"{c.p:.2g}") for name, c in rows
    ]
    return f"{stamp}\n\n{PAGE.format(table=markdown_table(header, lines), level=round(100 * LEVEL), draws=DRAWS)}"


def digest(tables: Sequence[Table]) -> str:
    """Of the records and of the source that decide the numbers of the page."""
    source = strip_prose(Path(__file__).read_text(encoding="utf-8"))
    rows = sorted(row.digest for table in tables for row in table.rows)
    return hashlib.sha256("\0".join([get_version(), source, *rows]).encode()).hexdigest()[:16]


def _list_cases(table: Table) -> Iterator[Case]:
    """Every pair of the baseline and a row that have items of a metric, and do not have the same."""
    if table.baseline is None:
        return
    before = table.baseline.records[0]
    for row in table.rows[1:]:
        pairs = Pairs(Side([before]), Side(row.records[:1]))
        for metric in select_quality(set(before.metrics) & set(row.records[0].metrics)):
            found = pairs.find(metric) if get_family(metric) in TESTED else []
            if any(pair.gaps.any() for pair in found):
                yield before, row.records[0], metric


def _stack(samples: Sequence[list[Any] | None]) -> Floats | None:
    """Items of several records [records, items, ...]; None where some has none, or others."""
    found = [np.asarray(one, dtype=np.float64) for one in samples if one is not None]
    alike = len(found) == len(samples) and len({values.shape for values in found}) == 1
    return np.stack(found) if alike else None


def _list_parts(record: Record, metric: str) -> list[str]:
    """The metrics that one is the mean of: of that over tasks the tasks."""
    return Side([record]).tasks if metric.startswith(TASKS) else [metric]


def _has_plain_numbers(before: Record, after: Record, metric: str) -> bool:
    pairs = Pairs(Side([before]), Side([after])).find(metric)
    return all(pair.changes is None and pair.sizes is None for pair in pairs)
