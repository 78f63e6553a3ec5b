"""Plots of fronts in plain numbers, as every format draws them: rows with values, bounds and what is known of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import msgspec

from effbench.report.fronts import Front, Fronts, Point, is_better_higher
from effbench.report.groups import Row
from effbench.report.metrics import get_limits, get_scale, get_title, get_unit
from effbench.report.text import one_line
from effbench.stats.paired import Estimate
from effbench.stats.pareto import Status

WIDE = 20.0  # how many times the least value the greatest is from which on an axis is logarithmic
ROOM = 0.12  # around the rows that may be on the front, in parts of their span
FAR = 3.0  # spans beyond which rows that cannot be on the front stand at the edge


class Axis(msgspec.Struct, frozen=True):
    """One axis, in the units in which tables print."""

    metric: str
    title: str
    unit: str  # as recorded
    higher: bool  # whether more is better
    logarithmic: bool
    low: float  # of what is shown
    high: float


class Spot(msgspec.Struct, frozen=True):
    """A row on the plot: value and bounds on both axes, by the unit of the axis."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    probability: float
    status: Status
    drawn: bool


class Picture(msgspec.Struct, frozen=True):
    """All that is drawn of a front."""

    x: Axis
    y: Axis
    spots: tuple[Spot, ...]
    absent: tuple[tuple[str, str], ...]  # rows without a place, and why
    once: tuple[str, ...]  # titles of what some row has measured once


def make_picture(front: Front) -> Picture:
    """The front in numbers."""
    spots = tuple(_make_spot(front, point) for point in front.points)
    return Picture(
        x=_make_axis(front.x, [spot.x for spot in spots], spots),
        y=_make_axis(front.y, [spot.y for spot in spots], spots),
        spots=spots,
        absent=tuple((one_line(row.recipe), reason) for row, reason in front.absent),
        once=tuple(map(get_title, front.once)),
    )


def trace_front(picture: Picture) -> list[tuple[float, float]]:
    """Corners of the line that divides what some row attains from what none does, in the order of x."""
    drawn = sorted((spot.x[0], spot.y[0]) for spot in picture.spots if spot.drawn)
    corners = [drawn[0]]
    for (x, y), (next_x, next_y) in itertools.pairwise(drawn):
        # Between two rows what is attained is the worse of both, on either axis.
        corners += [(x, next_y) if picture.x.higher else (next_x, y), (next_x, next_y)]
    return corners


def choose_axes(fronts: Fronts, x: Sequence[str], y: str | None) -> Iterator[tuple[str, str]]:
    """The pairs of metrics to draw: those named, or the table's own quality against each of its costs."""
    for quality in [y] if y else fronts.qualities[:1]:
        yield from ((cost, quality) for cost in x or fronts.costs if cost != quality)


def name_row(row: Row) -> str:
    """The recipe as plots print it."""
    return one_line(row.recipe)


def _make_spot(front: Front, point: Point) -> Spot:
    member = point.membership
    return Spot(
        name=name_row(point.row),
        x=_read(front.x, point.x),
        y=_read(front.y, point.y),
        probability=round(member.probability, 4),
        status=member.status,
        drawn=member.drawn,
    )


def _read(metric: str, estimate: Estimate) -> tuple[float, float, float]:
    """Value and bounds as tables print them: in their unit, within what the metric can be."""
    scale, (least, most) = get_scale(metric), get_limits(metric)
    low = estimate.value if estimate.low is None else max(least, estimate.low)
    high = estimate.value if estimate.high is None else min(most, estimate.high)
    value, low, high = (float(f"{scale * number:.6g}") for number in (estimate.value, low, high))
    return value, low, high


def _make_axis(metric: str, numbers: Sequence[tuple[float, float, float]], spots: Sequence[Spot]) -> Axis:
    """The axis with what it shows: every row, unless those that cannot be on the front are far from all others."""
    values = [value for value, _, _ in numbers]
    near = [n for n, spot in zip(numbers, spots, strict=True) if spot.status != "excluded"]
    ends = [bound for _, *bounds in near for bound in bounds]
    logarithmic = min(values) > 0 and max(_cut(values, ends)) / min(values) >= WIDE
    scaled, back = (math.log, math.exp) if logarithmic else (float, float)
    ends = [end for end in ends if end > 0 or not logarithmic]
    low, high = scaled(min(ends)), scaled(max(ends))
    span = (high - low) or abs(high) or 1.0
    within = [v for v in map(scaled, values) if low - FAR * span <= v <= high + FAR * span]
    if len(within) == len(values):
        low, high = min(low, *within), max(high, *within)
        span = (high - low) or span
    shown = back(low - ROOM * span)
    return Axis(
        metric=metric,
        title=get_title(metric),
        unit=get_unit(metric) or "",
        higher=is_better_higher(metric),
        logarithmic=logarithmic,
        low=max(shown, 0.0) if min(values) >= 0 else shown,
        high=back(high + ROOM * span),
    )


def _cut(values: Sequence[float], ends: Sequence[float]) -> list[float]:
    """Values without those that are far above all ends."""
    return [value for value in values if value <= max(ends) * (1 + FAR)]
