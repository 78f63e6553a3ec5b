"""Paired differences between two rows, and the tests of a table's rows against its baseline."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from effbench.core.provenance import strip_prose
from effbench.records.definitions import DEFINITIONS
from effbench.records.record import Record
from effbench.report import metrics
from effbench.report.groups import Row, Table
from effbench.report.metrics import TASKS, get_family, get_task, select_tasks
from effbench.stats import components, paired
from effbench.stats.components import Components, split_variance
from effbench.stats.paired import Estimate, Floats, answers_interval, holm, mcnemar, mean_interval

LEVEL = 0.05
TESTED = ("perplexity", "accuracy", "quality")  # kinds of metrics that a table tests
ANSWERED = ("accuracy", "quality")  # kinds whose items may be right and wrong answers
OVER_TOKENS = ("perplexity", "distance")  # kinds whose items are windows or texts, means over their tokens


class Test(msgspec.Struct, frozen=True, gc=False):
    """A difference from the baseline: its sign and size, the p of there being none, and where its spread comes from."""

    value: float
    p: float
    spread: Components | None = None


Kept = Mapping[str, Mapping[str, Test]]  # by `make_key`: the tests of a row by metric, before Holm


def read_items(record: Record, metric: str) -> Floats | None:
    """Per-item values whose mean is the metric, or the log of a perplexity; None when there are none."""
    if metric == "top1_agreement":
        flips = read_items(record, "flips")
        return None if flips is None else 1 - flips
    samples = record.samples.get(find_name(record, metric))
    if not isinstance(samples, (list, tuple, np.ndarray)) or len(samples) == 0:
        return None
    try:
        values = np.asarray(samples, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):  # not numbers, or lists of unlike lengths
        return None
    if values.ndim == 2 and values.shape[1] == 2 and values[:, 1].sum() > 0:
        # (log-likelihood, words) of texts; how many words they have does not depend on the model
        with np.errstate(over="ignore", invalid="ignore"):
            values = -values[:, 0] / values[:, 1].mean()
    return values if values.ndim == 1 and np.isfinite(values).all() else None


def find_name(record: Record, metric: str) -> str:
    """The name of the samples that are the metric's items; that of a perplexity of windows is another than its own."""
    return windows if (windows := f"{metric}_window_nll") in record.samples else metric


def average_items(records: Sequence[Record], metric: str) -> Floats | None:
    """Per-item values averaged over the records of a row, its seeds; None unless all have the same items."""
    first = read_items(records[0], metric)
    if len(records) == 1:
        return first
    others = [read_items(record, metric) for record in records[1:]]
    if first is None or any(one is None or one.shape != first.shape for one in others):
        return None
    if any(record.protocols.get(metric) != records[0].protocols.get(metric) for record in records):
        return None
    mean: Floats = np.mean(np.stack([first, *(one for one in others if one is not None)]), axis=0)
    return mean


class Side:
    """One side of a comparison: the records of a row with their items, each metric's read once."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self._items: dict[str, Floats | None] = {}
        self._answers: dict[str, bool] = {}

    @functools.cached_property
    def tasks(self) -> list[str]:
        """The accuracies that the mean over tasks is of."""
        metrics = self.records[0].metrics
        return [name for name in select_tasks(metrics) if not metrics[name].findings.get("not_exercised")]

    def list_cut(self, metric: str) -> Floats | None:
        """1 for each item of a task whose prompt was cut in any of the records; None where none was."""
        task = get_task(metric)
        cut = [record.samples.get(f"{task}_cut") for record in self.records] if task else []
        found = [np.asarray(one, dtype=np.float64) for one in cut if one is not None]
        alike = {one.shape for one in found}
        return np.max(np.stack(found), axis=0) if len(alike) == 1 else None

    def list_sizes(self, metric: str) -> Floats | None:
        """How large each item is, over the mean, where the metric is a ratio of sums; None where all count alike."""
        samples = self.records[0].samples.get(find_name(self.records[0], metric))
        items = np.asarray(() if samples is None else samples, dtype=np.float64)
        return items[:, 1] / items[:, 1].mean() if items.ndim == 2 else None

    def average(self, metric: str) -> Floats | None:
        """`average_items` of the records."""
        if metric not in self._items:
            self._items[metric] = average_items(self.records, metric)
        return self._items[metric]

    def has_answers(self, metric: str) -> bool:
        """Whether the items are right and wrong answers: ones and zeros."""
        if metric not in self._answers:
            values = self.average(metric)
            self._answers[metric] = values is not None and bool(((values == 0) | (values == 1)).all())
        return self._answers[metric]


class Pair(NamedTuple):
    """The items of one metric on both sides, and for right and wrong answers how many were lost and gained."""

    before: Floats
    after: Floats
    changes: tuple[int, int] | None
    whole: NDArray[np.bool_]  # which of all items these are: of those whose prompt was cut on no side
    sizes: Floats | None  # of texts of unlike size, over their mean; the metric is a ratio of sums then

    def weigh(self, gaps: Floats) -> Floats:
        """Gaps [..., items] as items of equal weight with the mean and the standard error of the ratio of sums: what a
        long text has for being long goes (the delta method)."""
        return gaps if self.sizes is None else gaps - gaps.mean(axis=-1, keepdims=True) * (self.sizes - 1)

    @property
    def gaps(self) -> Floats:
        """What `after` has more, item by item."""
        return self.weigh(self.after - self.before)


class Pairs:
    """The items of two sides, paired; each metric is read and counted once."""

    def __init__(self, before: Side, after: Side) -> None:
        self.before, self.after = before, after
        self._known: dict[str, Pair | None] = {}

    def list_parts(self, metric: str) -> list[str]:
        """What a metric is the mean of: of that over tasks the tasks, where they are those of both sides."""
        if not metric.startswith(TASKS):
            return [metric]
        return self.after.tasks if self.after.tasks == self.before.tasks else []

    def split_spread(self, metric: str) -> Components | None:
        """The components of the difference's variance; None where items cannot be paired or are too few."""
        if len(self.after.records) == 1:
            return split_variance([pair.gaps[np.newaxis] for pair in self.find(metric)])
        strata = []
        for part, pair in zip(self.list_parts(metric), self.find(metric), strict=False):
            before = self.before.average(part)
            runs = [read_items(record, part) for record in self.after.records]
            if before is None or any(run is None or run.shape != before.shape for run in runs):
                return None
            values = np.stack([run for run in runs if run is not None])[:, pair.whole]
            strata.append(pair.weigh(values - pair.before))
        return split_variance(strata) if strata else None

    def find(self, metric: str) -> list[Pair]:
        """The pairs of a metric, for the mean over tasks one per task. Empty where items cannot be paired."""
        pairs = []
        for part in self.list_parts(metric):
            if part not in self._known:
                self._known[part] = self._pair(part)
            if (pair := self._known[part]) is None:
                return []
            pairs.append(pair)
        return pairs

    def _pair(self, metric: str) -> Pair | None:
        left, right = self.before.average(metric), self.after.average(metric)
        if left is None or right is None or left.shape != right.shape:
            return None
        if self.before.records[0].protocols.get(metric) != self.after.records[0].protocols.get(metric):
            return None
        cuts = [cut for side in (self.before, self.after) if (cut := side.list_cut(metric)) is not None]
        whole = np.ones(left.shape, dtype=bool)
        if cuts and all(cut.shape == left.shape for cut in cuts):
            whole = np.max(np.stack(cuts), axis=0) == 0
            left, right = left[whole], right[whole]
            if not left.size:
                return None
        answers = get_family(metric) in ANSWERED and self.before.has_answers(metric) and self.after.has_answers(metric)
        changes = count_changes(left, right) if answers else None
        sizes = self.before.list_sizes(metric)
        if sizes is None:
            return Pair(left, right, changes, whole, None)
        mean = sizes[whole].mean()
        return Pair(left / mean, right / mean, changes, whole, sizes[whole] / mean)


def estimate_difference(before: Sequence[Record], after: Sequence[Record], metric: str) -> Estimate | None:
    """Mean over the items of what `after` has more than `before`, of the logarithm for a perplexity.

    An item is averaged over the seeds of each side first, because the items are the sample. So the two sides are
    alike to it: exchanging them changes the sign and nothing else. None where the items cannot be paired.
    """
    pairs = Pairs(Side(before), Side(after)).find(metric)
    if not pairs:
        return None
    test = mean_interval(*(pair.gaps for pair in pairs), averages=get_family(metric) in OVER_TOKENS)
    changes = _sum_changes(pairs)
    if changes is None:
        return test
    low, high = answers_interval([(*pair.changes, pair.before.size) for pair in pairs if pair.changes is not None])
    return msgspec.structs.replace(test, low=low, high=high, p=mcnemar(*changes))


def _test_metric(pairs: Pairs, metric: str) -> Test | None:
    """The difference without its interval."""
    found = pairs.find(metric)
    if not found:
        return None
    spread, changes = pairs.split_spread(metric), _sum_changes(found)
    if changes is not None:
        lost, gained = changes
        return Test((gained - lost) / sum(pair.before.size for pair in found), mcnemar(lost, gained), spread)
    averages = get_family(metric) in OVER_TOKENS
    test = mean_interval(*(pair.gaps for pair in found), level=None, averages=averages)
    return Test(test.value, test.p, spread)


def count_changes(before: Floats, after: Floats) -> tuple[int, int]:
    """How many right answers are lost and gained from one side to the other."""
    return int(np.count_nonzero(before > after)), int(np.count_nonzero(before < after))


def _sum_changes(pairs: Sequence[Pair]) -> tuple[int, int] | None:
    """Answers lost and gained over all tasks; None where not all are answers, each of which counts alike."""
    changes = [pair.changes for pair in pairs if pair.changes is not None]
    if len(changes) < len(pairs) or len({pair.before.size for pair in pairs}) > 1:
        return None
    return sum(lost for lost, _ in changes), sum(gained for _, gained in changes)


# ---- the tests of a table -----------------------------------------------------------------------


def compute_tests(table: Table, kept: Kept | None = None) -> dict[tuple[str, str], Test]:
    """(recipe, metric): difference from the baseline with its p after Holm over all rows and metrics.

    Tests of rows that are in `kept` are taken from there.
    """
    tests = {
        (recipe, metric): test for recipe, row in compute_row_tests(table, kept).items() for metric, test in row.items()
    }
    adjusted = holm([test.p for test in tests.values()])
    return {key: msgspec.structs.replace(test, p=p) for (key, test), p in zip(tests.items(), adjusted, strict=True)}


def compute_row_tests(table: Table, kept: Kept | None = None) -> dict[str, Mapping[str, Test]]:
    """By recipe and metric: difference from the baseline and its own p. Empty without a baseline."""
    baseline = table.baseline
    if baseline is None:
        return {}
    names = [name for name in metrics.select_quality(table.measured) if get_family(name) in TESTED]
    names = [name for name in names if baseline.estimate(name)]
    before = Side(baseline.records)
    tests: dict[str, Mapping[str, Test]] = {}
    for row in table.rows[1:]:
        known = kept.get(make_key(baseline, row)) if kept else None
        tests[row.recipe] = _test_row(before, row, names) if known is None else known
    return tests


def _test_row(before: Side, row: Row, names: Sequence[str]) -> dict[str, Test]:
    pairs = Pairs(before, Side(row.records))
    tests = {name: _test_metric(pairs, name) for name in names if row.estimate(name)}
    return {name: test for name, test in tests.items() if test is not None}


# ---- tests kept with a publication --------------------------------------------------------------


def read_kept(path: Path) -> Kept:
    """The tests in a file of `kept_text`, empty unless this version of the statistics wrote it.

    One that cannot be read counts as empty: it is written anew from the records, and the check of the generated files
    sees that it was not what it should be.
    """
    try:
        return parse_kept(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def parse_kept(text: str) -> Kept:
    """The tests in a text of `kept_text`; empty when another version of the statistics wrote it."""
    document = json.loads(text)
    if document["statistics"] != get_version():
        return {}
    return {key: {metric: _read_test(*kept) for metric, kept in row.items()} for key, row in document["rows"].items()}


def _read_test(value: float, p: float, *spread: float) -> Test:
    return Test(float(value), float(p), msgspec.convert(list(spread), Components) if spread else None)


def write_kept(tables: Sequence[Table], kept: Kept) -> str:
    """The file that keeps the tests of all rows: a line each, by the digest of the records that they stand on."""
    lines: dict[str, Mapping[str, Test]] = {}
    for table in tables:
        tests = compute_row_tests(table, kept)
        if table.baseline is not None:
            lines |= {make_key(table.baseline, row): tests[row.recipe] for row in table.rows[1:]}
    body = ",\n".join(
        f"{json.dumps(key)}: {json.dumps({metric: _list_numbers(test) for metric, test in row.items()})}"
        for key, row in sorted(lines.items())
    )
    return f'{{"statistics": "{get_version()}", "rows": {{\n{body}\n}}}}\n'


def _list_numbers(test: Test) -> list[float]:
    return [test.value, test.p, *(msgspec.structs.astuple(test.spread) if test.spread else ())]


def make_key(baseline: Row, row: Row) -> str:
    """Which records a row's tests stand on, and what was measured."""
    return f"{baseline.digest}-{row.digest}"


@functools.cache
def get_version() -> str:
    """Digest of the source and of the kinds of metrics that decide these numbers; comments decide nothing."""
    sources = (__file__, metrics.__file__, paired.__file__, components.__file__)
    kinds = [f"{one.pattern} {one.family}" for one in DEFINITIONS if one.family in TESTED]
    text = "\0".join([*(strip_prose(Path(file).read_text(encoding="utf-8")) for file in sources), *kinds])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
