"""Plots of fronts by matplotlib, for papers and pages: PNG, SVG and PDF, the same bytes for the same numbers."""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from effbench.report.folder import MARK
from effbench.report.pictures import Axis, Picture, Spot, trace_front
from effbench.report.text import rounded
from effbench.stats.pareto import LEVEL, ROBUST

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 34  # characters of a name
MOST_COLUMNS = 2  # of panels
INCHES = (5.6, 3.9)  # of a panel
SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # what a reader of an SVG has of these
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "pdf.fonttype": 42,  # text that can be searched and copied
    "svg.fonttype": "none",
    "svg.hashsalt": MARK,  # names of clips and markers, which would be random
    "text.parse_math": False,  # a name with dollars stays a name
}
DATES = {"svg": "Date", "pdf": "CreationDate"}  # by which files of the same numbers would differ
STYLES: dict[str, dict[str, Any]] = {  # by status; beside colour the shape tells
    "robust": {"marker": "o", "color": "#1d4ed8", "markersize": 6, "label": f"front, {100 * ROBUST:g} % or more"},
    "open": {
        "marker": "o", "color": "#1d4ed8", "markerfacecolor": "white", "markersize": 6, "label": "cannot be excluded",
    },
    "excluded": {"marker": "x", "color": "#9ca3af", "markersize": 4.5, "label": f"excluded at {100 * LEVEL:g} %"},
}  # fmt: skip
FAINT = {"robust": "#a5b8ea", "open": "#a5b8ea", "excluded": "#dde0e4"}  # bars
OF_FRONT = "#93c5fd"
BARS = "Bars: 95 % intervals of each row by itself. Rows are compared item by item, which tells more of them apart."
# Where a name may stand beside its point, in points: right, left, above, below, then farther off.
PLACES = [
    (step * dx, step * dy, "left" if dx > 0 else "right" if dx < 0 else "center")
    for step in (6, 11, 18)
    for dx, dy in ((1, 1), (1, -1.1), (-1, 1), (-1, -1.1), (0, 1.5), (0, -1.8))
]


def draw(pictures: Sequence[Picture], title: str, style: str, described: str = "") -> bytes:
    """One panel for each picture, as png, svg or pdf. An SVG holds `described` as its description."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    out = io.BytesIO()
    columns = min(len(pictures), MOST_COLUMNS)
    rows = -(-len(pictures) // columns)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that the font lacks
        figure = Figure(figsize=(INCHES[0] * columns, INCHES[1] * rows + 0.5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, picture in itertools.zip_longest(panels, pictures):
            axes.set_axis_off() if picture is None else _draw_panel(axes, picture)
        present = {spot.status for picture in pictures for spot in picture.spots}
        handles = [Line2D([], [], linestyle="none", **style) for status, style in STYLES.items() if status in present]
        handles.append(Line2D([], [], color=OF_FRONT, label="front as the numbers stand"))
        figure.legend(
            handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=7.5,
            title=BARS, title_fontsize=7, alignment="left",
        )  # fmt: skip
        canvas.draw()  # where things are is known from here on
        for axes, picture in zip(figure.axes, pictures, strict=False):
            _place_names(axes, picture)
        metadata: dict[str, Any] = {"Software" if style == "png" else "Creator": MARK}
        metadata |= {DATES[style]: None} if style in DATES else {}
        metadata |= {"Description": described} if style == "svg" and described else {}
        figure.savefig(out, format=style, dpi=200, metadata=metadata)
    return out.getvalue()


def _draw_panel(axes: Axes, picture: Picture) -> None:
    for way, axis in (("x", picture.x), ("y", picture.y)):
        _set_scale(axes, way, axis)
    corners = [(_clip(x, picture.x), _clip(y, picture.y)) for x, y in trace_front(picture)]
    axes.plot(*zip(*corners, strict=True), color=OF_FRONT, linewidth=1.2, zorder=1)
    for status, style in STYLES.items():
        inside = [spot for spot in picture.spots if spot.status == status and _is_inside(spot, picture)]
        if inside:
            bars = [[[v - low, high - v] for v, low, high in (getattr(s, way) for s in inside)] for way in "xy"]
            x, y = ([getattr(spot, way)[0] for spot in inside] for way in "xy")
            errors = [list(zip(*bar, strict=True)) for bar in bars]
            axes.errorbar(
                x, y, xerr=errors[0], yerr=errors[1], linestyle="none", ecolor=FAINT[status], elinewidth=0.8, **style
            )
    for spot in picture.spots:
        if not _is_inside(spot, picture):  # an arrow at the edge
            place = (_clip(spot.x[0], picture.x), _clip(spot.y[0], picture.y))
            above = spot.y[0] > picture.y.high
            below = spot.y[0] < picture.y.low
            marker = "^" if above else "v" if below else ">" if spot.x[0] > picture.x.high else "<"
            axes.plot(*place, marker=marker, color="#9ca3af", markersize=5, clip_on=False)


def _set_scale(axes: Axes, way: str, axis: Axis) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    own = axes.xaxis if way == "x" else axes.yaxis
    if axis.logarithmic:
        (axes.set_xscale if way == "x" else axes.set_yscale)("log")
        narrow = axis.high / axis.low < 100
        own.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        own.set_minor_formatter(NullFormatter())
    (axes.set_xlim if way == "x" else axes.set_ylim)(axis.low, axis.high)
    plain = FuncFormatter(lambda value, place: f"{value:g}")
    own.set_major_formatter(EngFormatter("B") if axis.unit == "bytes" else plain)
    better = "more" if axis.higher else "less"
    (axes.set_xlabel if way == "x" else axes.set_ylabel)(f"{axis.title} ({better} is better)")


def _place_names(axes: Axes, picture: Picture) -> None:
    """Write each name where it hides nothing, those of the front first, and others only where there is room."""
    taken = [_box(axes.transData.transform(_place(spot, picture)), 8, 8) for spot in picture.spots]
    frame, per_point = axes.get_window_extent(), axes.figure.dpi / 72
    ranked = sorted(picture.spots, key=lambda spot: (spot.status == "excluded", not spot.drawn, -spot.probability))
    for spot in ranked:
        at = axes.transData.transform(_place(spot, picture))
        name = spot.name if len(spot.name) <= LONGEST else spot.name[: LONGEST - 1] + "…"
        if not _is_inside(spot, picture):
            name += f": {rounded(spot.y[0])}" if not picture.y.low <= spot.y[0] <= picture.y.high else ""
        text = axes.annotate(
            name, _place(spot, picture), xytext=(0, 0), textcoords="offset points", fontsize=7.5, va="center",
            color="#6b7280" if spot.status == "excluded" else "#111827", annotation_clip=False, zorder=5,
        )  # fmt: skip
        size = text.get_window_extent()
        # On its better side a row of the front has no other beside it.
        for dx, dy, side in sorted(PLACES, key=lambda place: spot.drawn and (place[1] > 0) != picture.y.higher):
            left = at[0] + dx * per_point - {"left": 0, "right": 1, "center": 0.5}[side] * size.width
            box = (left - 2, at[1] + dy * per_point - size.height / 2, size.width + 4, size.height)
            if _fits(box, frame) and not any(_overlap(box, other) for other in taken):
                text.set(position=(dx, dy), ha=side)
                taken.append(box)
                break
        else:
            if spot.drawn:
                text.set(position=PLACES[0][:2], ha=PLACES[0][2])
            else:
                text.remove()


def _place(spot: Spot, picture: Picture) -> tuple[float, float]:
    return _clip(spot.x[0], picture.x), _clip(spot.y[0], picture.y)


def _clip(value: float, axis: Axis) -> float:
    return min(max(value, axis.low), axis.high)


def _is_inside(spot: Spot, picture: Picture) -> bool:
    return _place(spot, picture) == (spot.x[0], spot.y[0])


def _box(centre: Any, width: float, height: float) -> tuple[float, float, float, float]:
    return centre[0] - width / 2, centre[1] - height / 2, width, height


def _fits(box: tuple[float, float, float, float], frame: Any) -> bool:
    left, bottom, width, height = box
    return bool(frame.x0 <= left and left + width <= frame.x1 and frame.y0 <= bottom and bottom + height <= frame.y1)


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return (
        one[0] < other[0] + other[2] and other[0] < one[0] + one[2]
        and one[1] < other[1] + other[3] and other[1] < one[1] + one[3]
    )  # fmt: skip
