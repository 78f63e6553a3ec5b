"""What changed from one row to another, metric by metric, each by the samples that it has.

| basis | of what | how |
| --- | --- | --- |
| items | quality | paired by item, as in `differences.py` |
| rounds | timings of single calls; of a speed-up, the ratios of calls in turns with the unchanged model | Yuen's test |
| records | the same and other measured numbers, where both sides have seeds enough | Yuen's test over the seeds |
| intervals | measured numbers of which the record has an interval alone | as independent and normal |
| count | bytes, operations and tokens that are counted | exact: any difference is one |

What was measured on a machine is compared on one host only, and by logarithms: a change is a ratio.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from effbench.records.record import Record
from effbench.report.differences import Side, average_items, estimate_difference
from effbench.report.groups import Row, get_host
from effbench.report.metrics import (
    TASKS,
    find_definition,
    get_family,
    get_limits,
    get_scale,
    get_unit,
    natural_key,
    select_quality,
)
from effbench.report.verdicts import QUALITY
from effbench.stats.paired import Estimate, Floats
from effbench.stats.unpaired import compare_intervals, compare_means, trimmed_mean

Basis = Literal["items", "rounds", "records", "intervals", "count"]

COUNTED = ("bytes", "bits", "FLOP", "tokens", "")  # units of what is counted and not sampled
SAMPLED = r".*_peak_(?!allocated).*_bytes"  # bytes that the operating system or the driver saw now and then
UNJUDGED = ("fraction", "nats", "%")  # units of costs and speeds that say nothing by their ratio
SPEEDUP = re.compile(r"(prefill|decode)_speedup_(.+)")
SEEDS = 3  # records a side from which on they are the sample, and not the calls within them
PAIR = 2


@dataclasses.dataclass(frozen=True)
class Change:
    """One metric of two rows, in the units in which it is shown."""

    metric: str
    before: float
    after: float
    low: float | None  # bounds of `value`
    high: float | None
    test: Estimate  # of the differences; of logarithms for a perplexity and for all that is relative
    basis: Basis = "items"

    @property
    def relative(self) -> bool:
        """Whether the change is a ratio rather than a difference."""
        return self.basis != "items"

    @property
    def value(self) -> float:
        """after - before, or after / before."""
        if not self.relative:
            return self.after - self.before
        return self.after / self.before if self.before else math.inf


@dataclasses.dataclass(frozen=True)
class Changes:
    """All that can be said of two rows."""

    found: tuple[Change, ...]
    equal: int = 0  # counted metrics without any difference, which are not among those found
    untested: tuple[str, ...] = ()  # metrics that were measured once a side
    apart: tuple[str, ...] = ()  # metrics of other protocols
    elsewhere: tuple[str, ...] = ()  # metrics that hold on one host alone, of rows of two hosts


def find_changes(before: Row, after: Row) -> Changes:
    """The changes of quality, then those of all else, in natural order."""
    quality = list(compare_metrics(before.records, after.records))
    rest = _compare_rest(before, after)
    return dataclasses.replace(rest, found=(*quality, *rest.found))


# ---- quality, by item ---------------------------------------------------------------------------


def compare_metrics(before: Sequence[Record], after: Sequence[Record]) -> Iterator[Change]:
    """The change of every metric of quality whose items can be paired."""
    for metric in select_quality({*before[0].metrics} & {*after[0].metrics}):
        test = estimate_difference(before, after, metric)
        if test is not None:
            with contextlib.suppress(OverflowError):  # a perplexity beyond all numbers
                yield _make_change(metric, _measure_level(before, metric), _measure_level(after, metric), test)


def _measure_level(records: Sequence[Record], metric: str) -> float:
    """The metric as the mean of its items, each averaged over the records; the logarithm for a perplexity."""
    parts = Side(records).tasks if metric.startswith(TASKS) else [metric]
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


# ---- speed, size, energy and cost, by ratio -----------------------------------------------------


def _compare_rest(before: Row, after: Row) -> Changes:
    common = set.intersection(*({*record.metrics} for record in (*before.records, *after.records)))
    names = [name for name in sorted(common, key=natural_key) if _has_verdict(name)]
    apart = [name for name in names if len({one.protocols.get(name) for one in (*before.records, *after.records)}) > 1]
    hosts = {get_host(record) for record in (*before.records, *after.records)}
    one_host = len(hosts) == 1 and "" not in hosts
    found, untested, elsewhere, equal = [], [], [], 0
    for name in names:
        if name in apart or (get_family(name) == "speed" and (before.simulated or after.simulated)):
            continue
        counted = is_counted(name)
        if not counted and not one_host:
            elsewhere.append(name)
            continue
        change = _compare_counts(before, after, name) if counted else _compare_measured(before, after, name)
        if change is None:
            untested.append(name)
        elif change.basis == "count" and change.before == change.after:
            equal += 1
        else:
            found.append(change)
    return Changes(tuple(found), equal, tuple(untested), tuple(apart), tuple(elsewhere))


def _has_verdict(metric: str) -> bool:
    """Whether a change of this cost, size or speed by a ratio says something, and no other metric says the same.

    What was timed in turns with the unchanged model is compared by its speed-up alone: seconds of two processes differ
    by what else the machine was doing.
    """
    definition = find_definition(metric)
    if definition is None or definition.better == "neither" or definition.family in QUALITY:
        return False
    if definition.unit in UNJUDGED or definition.signed:
        return False
    return definition.family != "speed" or "{batch}" not in definition.pattern or bool(SPEEDUP.fullmatch(metric))


def is_counted(metric: str) -> bool:
    """Whether a number is counted rather than sampled: it is then the same whenever and wherever it is taken."""
    if get_family(metric) == "size":
        return True
    return get_family(metric) != "speed" and get_unit(metric) in COUNTED and not re.fullmatch(SAMPLED, metric)


def _compare_counts(before: Row, after: Row, metric: str) -> Change | None:
    """Exact where all seeds of a side have one number; else by the seeds."""
    left, right = ([record.metrics[metric].value for record in row.records] for row in (before, after))
    if len({*left}) > 1 or len({*right}) > 1:
        return _compare_logs(metric, _take_logs(left), _take_logs(right), "records")
    first, second = left[0], right[0]
    value = 0.0 if first == second else math.log(second / first) if first > 0 and second > 0 else math.copysign(
        math.inf, second - first
    )  # fmt: skip
    return Change(metric, first, second, None, None, Estimate(value, p=float(value == 0)), "count")


def _compare_measured(before: Row, after: Row, metric: str) -> Change | None:
    """By calls that were timed, by seeds, or by the intervals of two records; None where nothing has a spread."""
    left, right = ([read_times(record, metric) for record in row.records] for row in (before, after))
    rounds = [one for one in (*left, *right) if one is not None]
    if len(rounds) == len(left) + len(right):
        old, new = rounds[: len(left)], rounds[len(left) :]
        if min(len(old), len(new)) >= SEEDS:
            means = [np.array([trimmed_mean(one) for one in side]) for side in (old, new)]
            return _compare_logs(metric, means[0], means[1], "records")
        return _compare_logs(metric, np.concatenate(old), np.concatenate(new), "rounds")
    if min(len(left), len(right)) >= PAIR:
        values = [_take_logs([record.metrics[metric].value for record in row.records]) for row in (before, after)]
        return _compare_logs(metric, values[0], values[1], "records")
    bounds = [_take_log_interval(row.records[0], metric) for row in (before, after)]
    if len(before.records) > 1 or len(after.records) > 1 or bounds[0] is None or bounds[1] is None:
        return None
    test = compare_intervals(bounds[0], bounds[1])
    return None if test is None else _make_ratio(metric, bounds[0].value, bounds[1].value, test, "intervals")


def read_times(record: Record, metric: str) -> Floats | None:
    """Logarithms of what was timed call by call; of a speed-up, those of the ratios of calls in turns."""
    match = SPEEDUP.fullmatch(metric)
    if match is None:
        return _read_positive(record, metric)
    ours, theirs = (_read_positive(record, f"{match[1]}_{role}seconds_{match[2]}") for role in ("", "reference_"))
    return None if ours is None or theirs is None or ours.shape != theirs.shape else theirs - ours


def _read_positive(record: Record, name: str) -> Floats | None:
    """Logarithms of samples that are two positive numbers or more."""
    samples = record.samples.get(name)
    if not isinstance(samples, (list, tuple, np.ndarray)) or len(samples) < PAIR:
        return None
    try:
        values = np.asarray(samples, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return np.log(values) if values.ndim == 1 and np.isfinite(values).all() and (values > 0).all() else None


def _take_logs(values: Sequence[float]) -> Floats | None:
    return np.log(values) if min(values) > 0 else None


def _take_log_interval(record: Record, metric: str) -> Estimate | None:
    one = record.metrics[metric]
    if one.low is None or one.high is None or min(one.value, one.low) <= 0 or not math.isfinite(one.high):
        return None
    return Estimate(math.log(one.value), math.log(one.low), math.log(one.high), n=one.n or 1)


def _compare_logs(metric: str, before: Floats | None, after: Floats | None, basis: Basis) -> Change | None:
    """The ratio of two samples of logarithms; None where one of them has no spread that could be known."""
    if before is None or after is None or min(len(before), len(after)) < PAIR:
        return None
    test = compare_means(before, after)
    return _make_ratio(metric, trimmed_mean(before), trimmed_mean(after), test, basis)


def _make_ratio(metric: str, before: float, after: float, test: Estimate, basis: Basis) -> Change:
    low, high = (None if bound is None else math.exp(min(bound, 700.0)) for bound in (test.low, test.high))
    return Change(metric, math.exp(before), math.exp(after), low, high, test, basis)
