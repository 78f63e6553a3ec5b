"""Plots of documents: SVG files that hold the numbers they were drawn from.

Two versions of matplotlib draw the same numbers by other bytes. So a file is not compared byte by byte: it is what the
records say when the numbers in it are theirs, this version draws such plots, and its digest tells that nobody has
touched it. Nothing has to be drawn to check that.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

import msgspec

from effbench.core.errors import Usage
from effbench.core.provenance import strip_prose
from effbench.report.choice import Choice
from effbench.report.figures import STYLES, resolve_axes
from effbench.report.folder import name_file, need
from effbench.report.fronts import FEWEST, Fronts
from effbench.report.groups import Table
from effbench.report.pictures import Picture, choose_axes, make_picture
from effbench.report.styles import plot
from effbench.report.text import markdown

DIGITS = 16  # of a digest
BLANK = "0" * DIGITS  # in its place while it is computed
DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


@dataclasses.dataclass
class PlotBlock:
    """One plot of a suite's table; by default its own quality against the first of its costs."""

    tier: str | None = None
    model: str | None = None
    rows: str | None = None  # names of recipes, or patterns: the front is among these
    x: str | None = None  # what rows cost: a metric or a header
    y: str | None = None  # how good they are


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A plot with its file."""

    path: Path
    title: str
    picture: Picture

    @property
    def facts(self) -> dict[str, object]:
        """What the file says of itself, but for its digest."""
        return {"version": get_version(), "title": self.title, "picture": msgspec.to_builtins(self.picture)}

    def render(self) -> str:
        """The text of the file: that which is there, where it says the same, and else drawn anew.

        Raises `Usage` where it has to be drawn and matplotlib is missing.
        """
        present = self.path.read_bytes().decode(errors="replace") if self.path.is_file() else ""
        if read_facts(present) == json.loads(json.dumps(self.facts)):
            return present
        need("matplotlib", f"drawing {self.path.name}")
        described = json.dumps({**self.facts, "digest": BLANK}, sort_keys=True)
        text = plot.draw([self.picture], self.title, STYLES[1], described).decode()
        return text.replace(BLANK, compute_digest(text))

    def describe(self) -> str:
        """In words, for those who cannot see it."""
        named = [spot.name for spot in self.picture.spots if spot.status == "robust"]
        on = ", ".join(named) or "no row for certain"
        return f"{self.picture.y.title} against {self.picture.x.title} of {self.title}; on the front: {on}"

    def write_block(self, source: str, full: str) -> str:
        """Markdown: the plot, and below it what it shows and where its numbers are."""
        spots = self.picture.spots
        counts = {status: sum(spot.status == status for spot in spots) for status in ("robust", "open", "excluded")}
        alt = markdown(self.describe()).replace("[", "\\[").replace("]", "\\]")
        told = (
            f"{counts['robust']} of {len(spots)} rows are on the front with 90 % and more, "
            f"{counts['open']} cannot be excluded from it, and {counts['excluded']} can."
        )
        return f"![{alt}]({source})\n\n{markdown(self.title)}: {told} The numbers: [`{full}`]({full}).\n"


def make_drawing(table: Table, title: str, block: PlotBlock, folder: Path) -> Drawing:
    """The plot of a table that a marker asks for. Raises `Usage` where there is nothing to plot."""
    choice = Choice.read(block.rows, None)
    choice.check([table])
    table = dataclasses.replace(table, rows=tuple(choice.select_rows(table)))
    (costs, qualities), fronts = (resolve_axes([table], way, getattr(block, way)) for way in "xy"), Fronts(table)
    pairs = list(choose_axes(fronts, costs, next(iter(qualities), None)))
    if not pairs or len((front := fronts.find(*pairs[0])).points) < FEWEST:
        raise Usage(f"nothing to plot: name x= and y= that {FEWEST} rows have")
    name = name_file(f"{title} {front.y} {front.x}", STYLES[1])
    return Drawing(folder / name, title, make_picture(front))


def read_facts(text: str) -> object:
    """What an SVG says that it was drawn from; None where it says nothing, or is not what was drawn."""
    try:
        described = next(ElementTree.fromstring(text).iter(DESCRIPTION)).text or ""
        facts = json.loads(described)
        digest = facts.pop("digest")
    except (ElementTree.ParseError, StopIteration, ValueError, AttributeError, KeyError, TypeError):
        return None
    return facts if digest == compute_digest(text.replace(str(digest), BLANK)) else None


def compute_digest(text: str) -> str:
    """Of a drawing whose own digest is blank."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


@functools.cache
def get_version() -> str:
    """Digest of the source that draws; comments draw nothing."""
    source = strip_prose(Path(plot.__file__).read_text(encoding="utf-8"))
    return hashlib.sha256(source.encode()).hexdigest()[:DIGITS]


def check_apart(drawings: Sequence[Drawing]) -> None:
    """Raise `Usage` where two plots would be one file."""
    for number, drawing in enumerate(drawings):
        for other in drawings[:number]:
            if other.path == drawing.path and other.picture != drawing.picture:
                raise Usage(f"two plots are called {drawing.path.name}: leave out one of them, or rows=")
