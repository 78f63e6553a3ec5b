"""Plots of fronts as files, one for each table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from effbench.core.errors import Usage
from effbench.core.usage import LONGEST, nearest
from effbench.report.choice import Choice, find_metric, list_metrics
from effbench.report.folder import name_file, need, open_folder, write_file
from effbench.report.fronts import FEWEST, Fronts
from effbench.report.groups import Table
from effbench.report.pictures import Picture, choose_axes, make_picture
from effbench.report.sheets import make_titles

STYLES = ("png", "svg", "pdf")


def write_figures(
    tables: Sequence[Table], folder: Path, style: str, choice: Choice, x: str | None = None, y: str | None = None
) -> list[Path]:
    """One file for each table that has something to plot, a panel for each of its costs or of those named.

    `x` is names of costs between commas and `y` a quality: metrics or headers of columns. Of chosen rows the front is
    among these alone. Raises `Usage` for names that nothing has, and where there is nothing to plot.
    """
    need("matplotlib", f"format={style}")
    from effbench.report.styles import plot

    open_folder(folder)
    written: list[Path] = []
    for title, pictures in _list_pictures(tables, choice, x, y):
        path = folder / name_file(title, style)
        write_file(path, plot.draw(pictures, title, style))
        written.append(path)
    if not written:
        raise Usage(
            f"nothing to plot: no table has {FEWEST} rows that differ in a quality and in a cost; name x= and y="
        )
    return written


def resolve_axes(tables: Sequence[Table], option: str, names: str | None) -> list[str]:
    """The metrics of names between commas. Raises `Usage` for one that no table has, or that ranks nothing."""
    found = []
    for name in filter(None, map(str.strip, (names or "").split(","))):
        metrics = dict.fromkeys(find_metric(name, table.measured) for table in tables)
        known = [metric for metric in metrics if metric is not None]
        if not known:
            can = {key for table in tables for key in list_metrics(table.measured)}
            raise Usage(
                f"{option}={name[:LONGEST]}: no metric that can be better or worse has this name{nearest(name, can)}"
            )
        found.append(known[0])
    return found


def _list_pictures(
    tables: Sequence[Table], choice: Choice, x: str | None, y: str | None
) -> Iterator[tuple[str, list[Picture]]]:
    costs, qualities = (resolve_axes(tables, option, names) for option, names in (("x", x), ("y", y)))
    if len(qualities) > 1:
        raise Usage(f"y={y}: name one quality")
    for table, title in zip(tables, make_titles(tables), strict=True):
        fronts = Fronts(dataclasses.replace(table, rows=tuple(choice.select_rows(table))))
        pairs = choose_axes(fronts, costs, next(iter(qualities), None))
        drawn = [fronts.find(*pair) for pair in pairs if {*pair} <= {*table.measured}]
        if pictures := [make_picture(front) for front in drawn if len(front.points) >= FEWEST]:
            yield title, pictures
