"""A record's cell once more, from what the record says and nothing else: no suite is read, no default is asked for.

The recipe is made of the resolved fields, so that a default that has changed since changes nothing; settings, seed,
threads and arithmetic are the record's. What has to be the same is compared by digest before anything runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from effbench import sources
from effbench.cells.job import Job, Place
from effbench.cells.plan import FILES, check_files, choose_probes, digests
from effbench.core import registry
from effbench.core.errors import Unavailable, Usage
from effbench.core.method import Method
from effbench.core.recipe import Recipe, parse
from effbench.core.usage import list_some
from effbench.machine import environment
from effbench.machine.gate import gate_file
from effbench.machine.placement import Placement, place
from effbench.records.imported import is_imported
from effbench.records.record import Cell, Record
from effbench.sources import DataSource, Source

T = TypeVar("T")

NEEDED = ("probes", "device", "dtype", "threads")  # settings without which nobody knows what was run
SAME = {"model": "model", "data": "data", FILES: "content of the files that its methods read"}  # by digest


class CannotRun(Exception):
    """Why a cell cannot be run here and now."""


class Whereabouts(NamedTuple):
    """Where model and data lie, of records that name a folder or file: these do not keep its place."""

    model: str | None = None  # as in `effbench run`
    tokenizer: str | None = None
    data: str | None = None
    calibration_data: str | None = None

    def find_model(self, shown: str) -> Source:
        """The model that a record shows so. Raises `CannotRun`, and `Usage` for an option that names nothing."""
        if self.model is not None:
            return sources.model(self.model, self.tokenizer)
        return _look_up(sources.find_model, shown, "model")

    def find_data(self, shown: str) -> DataSource:
        """The data that a record shows so. Raises as `find_model`."""
        if self.data is not None:
            return sources.data(self.data, self.calibration_data)
        return _look_up(sources.find_data, shown, "data")


def restore(record: Record, scratch: Path, where: Whereabouts) -> tuple[Job, list[str]]:
    """The job of a record's cell, and the parameters that its methods have got since, which stand at their defaults.

    `scratch` is a folder for what lives as long as the run; nothing of earlier runs is in it. Raises `CannotRun`, and
    `Usage` for whereabouts that name nothing.
    """
    cell, settings = record.cell, record.cell.settings
    if is_imported(record):
        raise CannotRun("it was imported: another tool has measured it, in a way of its own")
    if missing := [name for name in NEEDED if name not in settings]:
        raise CannotRun(f"the record does not say its {list_some(missing)}")
    recipe, gained = _make_recipe(cell)
    source, data = where.find_model(cell.model), where.find_data(cell.data)
    present = _digest(recipe, settings["probes"], source, data)
    _check_same(cell.digests, present)
    placement = _place(settings)
    _check_reach(source, settings["probes"])
    on_cpu = settings["device"] == "cpu"
    if not on_cpu and recipe.ranks > len(placement.devices):
        raise CannotRun(f"it takes {recipe.ranks} GPUs, and there are {len(placement.devices)}")
    here = {"machine": placement.machine, "host": environment.host()}
    job = Job(
        dataclasses.replace(
            cell,
            steps=str(recipe),
            resolved=tuple(recipe.resolved()),
            settings=settings | {name: value for name, value in here.items() if name in settings},
            digests=present,
        ),
        source,
        data,
        tuple(Place(device.name, gate_file(device), device.visible) for device in placement.devices),
        ranks=recipe.ranks,
        scratch=scratch / "scratch",
        cache=scratch / "cache",
        probes=choose_probes(settings["probes"], recipe, on_cpu and recipe.ranks * placement.threads > placement.cores),
    )
    return job, gained


def _make_recipe(cell: Cell) -> tuple[Recipe, list[str]]:
    """The recipe of the resolved steps, and the parameters that its methods have got since. Raises `CannotRun`."""
    steps: list[Method] = []
    gained: list[str] = []
    try:
        for resolved in cell.resolved:
            key = resolved["method"]
            fields = {name: value for name, value in resolved.items() if name != "method"}
            kind = registry.load(key)
            known = {field.name for field in dataclasses.fields(kind)}
            if gone := sorted(fields.keys() - known):
                raise CannotRun(f"{key} has no parameter {list_some(gone)} any more")
            gained += [f"{key}.{name}" for name in sorted(known - fields.keys())]
            steps.append(kind(**fields))
        recipe = Recipe(cell.recipe, tuple(steps)).check()
        for point in cell.settings.get("tune", []):
            parse(point)
    except Usage as error:
        raise CannotRun(str(error)) from None
    return recipe, gained


def _look_up(find: Callable[[str], T | None], shown: str, option: str) -> T:
    """What was shown under a name. Raises `CannotRun` where that is no name any more, or not in the working folder."""
    try:
        found = find(shown)
    except Usage as error:
        raise CannotRun(str(error)) from None
    if found is None:
        raise CannotRun(f"{option} {shown} is not in the working folder: say where it lies with {option}_at=")
    return found


def _digest(recipe: Recipe, probes: list[str], source: Source, data: DataSource) -> dict[str, str]:
    try:
        return digests(recipe, probes, source.digest, data.digest)
    except (Usage, ValueError) as error:  # a file that a method reads, or a probe, is no more
        raise CannotRun(str(error)) from None


def _check_same(before: dict[str, str], after: dict[str, str]) -> None:
    """Raise `CannotRun` where what is at hand is not what the record was measured on."""
    for name, what in SAME.items():
        if before.get(name) != after.get(name):
            theirs, ours = (str(digests.get(name))[:12] for digests in (before, after))
            raise CannotRun(
                f"the {what} at hand is not the record's: its digest is {ours}, that of the record {theirs}"
            )


def _place(settings: dict[str, Any]) -> Placement:
    try:
        return place(settings["device"], settings["threads"], 1)
    except Usage as error:
        raise CannotRun(str(error)) from None


def _check_reach(source: Source, probes: list[str]) -> None:
    try:
        sources.check_reach(source)
        check_files(source, probes)
    except (Unavailable, Usage) as error:
        raise CannotRun(str(error)) from None
