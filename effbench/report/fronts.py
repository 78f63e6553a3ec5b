"""Fronts of Pareto over the rows of a table: quality against bytes, speed, energy or the cost of training."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from effbench.report.columns import ANSWERS, Column
from effbench.report.groups import Row, Table
from effbench.report.metrics import TASKS, find_definition, get_title, select_perplexities
from effbench.report.noise import Noise
from effbench.report.text import DASH
from effbench.stats.paired import Estimate
from effbench.stats.pareto import LEVEL, ROBUST, Membership, judge_rows

DETAIL = "front"  # the grid of this module
FEWEST = 3  # rows of a front that is worth showing
MOST = 100  # rows of a table that has fronts
QUALITIES = (  # in the order in which a table is about them; of what a pattern finds the first
    ANSWERS[0], "perplexity", "kl_nats_per_token", f"{TASKS}(_evict_at_context)?", ANSWERS[1],
    "answer_kl_nats_per_token", "acceptance",
)  # fmt: skip
COSTS = (
    *("stored_bytes", "cache_bytes_per_token", "fit_step_peak_bytes"),
    *("decode_speedup_.*", "prefill_speedup_.*", "drafted_speedup"),
    *("decode_energy_j_.*", "prefill_energy_j_.*", "fit_energy_j"),
    *("fit_step_ms", "apply_seconds"),
)
ALIKE = 0.01  # share of a value by which rows may differ and be alike
LEAST = {"apply_seconds": 1.0}  # of the largest value, for costs that may be too small for anybody to care
DRAWN = "●"
LEGEND = (
    f"{DRAWN}: not dominated as the numbers stand. In percent: how likely nothing dominates the row, when items, seeds "
    "and rounds of timing are drawn anew, items for all rows together. "
    f"Robust: {100 * ROBUST:g} % or more. Excluded: another row is better in both, at {100 * LEVEL:g} % after "
    "correction for all rows. Open: neither, so that the row may be on the front; rows that are alike share the chance."
)
MEANINGS = {"QUALITY / COST": LEGEND}


@dataclasses.dataclass(frozen=True)
class Point:
    """A row on a plot."""

    row: Row
    x: Estimate
    y: Estimate
    membership: Membership

    def __str__(self) -> str:
        share, status = self.membership.probability, self.membership.status
        percent = "<1" if 0 < share < 0.005 else ">99" if 0.995 < share < 1 else f"{100 * share:.0f}"
        return f"{DRAWN} {percent} % {status}" if self.membership.drawn else f"{percent} % {status}"


@dataclasses.dataclass(frozen=True)
class Front:
    """Where the rows of a table stand by two metrics."""

    x: str  # a metric: what a row costs
    y: str  # a metric: how good it is
    points: tuple[Point, ...]
    absent: tuple[tuple[Row, str], ...]  # rows without a place, and why
    once: tuple[str, ...]  # the metrics that some row has measured once, so that their noise is not known

    @property
    def title(self) -> str:
        return name_front(self.x, self.y)

    @property
    def drawn(self) -> list[Point]:
        """The front of the numbers as they stand, from one end to the other."""
        return sorted((point for point in self.points if point.membership.drawn), key=lambda point: point.x.value)


class Fronts:
    """The fronts of one table. Rows are drawn once for all of them."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._noise = Noise(table.rows)
        self.qualities = list(_find_axes(table, QUALITIES))
        self.costs = list(_find_axes(table, COSTS))

    def find(self, x: str, y: str) -> Front:
        """The front by any two metrics. Rows without one of them are named with the reason."""
        rows, drawn = self.table.rows, [self._noise.draw(metric) for metric in (x, y)]
        placed = [at for at in range(len(rows)) if not any(at in one.absent for one in drawn)]
        absent = [(rows[at], next(one.absent[at] for one in drawn if at in one.absent)) for at in _rest(rows, placed)]
        signs = [-1 if is_better_higher(metric) else 1 for metric in (x, y)]
        values = np.stack([sign * one.values[placed] for sign, one in zip(signs, drawn, strict=True)])
        draws = np.stack([sign * one.draws[:, placed] for sign, one in zip(signs, drawn, strict=True)])
        points = [
            Point(rows[at], _must(rows[at], x), _must(rows[at], y), membership)
            for at, membership in zip(placed, judge_rows(values, draws), strict=True)
        ]
        once = tuple(metric for metric, one in zip((x, y), drawn, strict=True) if one.once)
        return Front(x, y, tuple(points), tuple(absent), once)

    def find_telling(self) -> list[Front]:
        """Those of the table's own quality, which comes first, against each cost; of enough rows, and of no more than a
        reader takes in: each is judged against each."""
        if len(self.table.rows) > MOST:
            return []
        fronts = [self.find(x, y) for y in self.qualities[:1] for x in self.costs]
        return [front for front in fronts if len(front.points) >= FEWEST]


def name_front(x: str, y: str) -> str:
    """The two metrics, in words."""
    return f"{get_title(y)} / {get_title(x)}"


def make_front_columns(table: Table) -> list[Column]:
    """A column for each telling front: what is known of a row's being on it."""
    return [_make_column(front) for front in Fronts(table).find_telling()]


def is_ranking(metric: str) -> bool:
    """Whether more of it is better or worse."""
    definition = find_definition(metric)
    return definition is not None and definition.better != "neither"


def is_better_higher(metric: str) -> bool:
    """Whether more of it is better, as opposed to less."""
    definition = find_definition(metric)
    return definition is not None and definition.better == "higher"


def _make_column(front: Front) -> Column:
    cells = {id(point.row): str(point) for point in front.points}
    return Column(front.title, lambda row, tests: cells.get(id(row), DASH), meaning=LEGEND)


def _find_axes(table: Table, patterns: Sequence[str]) -> Iterator[str]:
    """The first metric of each pattern in which rows differ by more than would make anybody choose."""
    perplexities = select_perplexities(table.measured)[:1]
    for pattern in patterns:
        names = perplexities if pattern == "perplexity" else table.measured
        found = (name for name in names if pattern == "perplexity" or re.fullmatch(pattern, name))
        yield from itertools.islice((name for name in found if _differs(table, name)), 1)


def _differs(table: Table, metric: str) -> bool:
    values = [one.value for row in table.rows if (one := row.estimate(metric)) and math.isfinite(one.value)]
    alike = bool(values) and math.isclose(min(values), max(values), rel_tol=ALIKE)
    return bool(values) and not alike and max(values) >= LEAST.get(metric, -math.inf)


def _rest(rows: Sequence[Row], placed: Sequence[int]) -> list[int]:
    return [at for at in range(len(rows)) if at not in placed]


def _must(row: Row, metric: str) -> Estimate:
    estimate = row.estimate(metric)
    assert estimate is not None  # rows without one are absent
    return estimate
