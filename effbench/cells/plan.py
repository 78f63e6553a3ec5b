"""From a suite to records.

Cells are planned from recipes and seeds; those with a final record are left out, the others run in processes
of their own, and every record is written as soon as its cell ends.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from effbench import probes, sources
from effbench.cells import suite
from effbench.cells.job import Job, Place
from effbench.cells.options import RunOptions
from effbench.cells.suite import Suite, seeded
from effbench.core.errors import Usage
from effbench.core.kinds import kind_of
from effbench.core.method import Method
from effbench.core.provenance import digest_source, find_file
from effbench.core.recipe import Recipe
from effbench.core.usage import one_of
from effbench.machine.gate import gate_file
from effbench.machine.placement import Placement, place
from effbench.records.record import RETRIED, Cell, Record
from effbench.records.store import Store, latest


@dataclasses.dataclass(frozen=True)
class Planned:
    """A cell of a plan: to be run for a reason, or done and not run again."""

    job: Job
    why: str
    done: Record | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """All cells that a command asks for, in the order of the suite."""

    suite: Suite
    tier: str
    budget_minutes: float | None
    placement: Placement
    cells: tuple[Planned, ...]
    notes: tuple[str, ...]  # of the placement, and files in the results folder that were skipped

    @property
    def todo(self) -> list[Job]:
        """The jobs that are to be run."""
        return [cell.job for cell in self.cells if cell.done is None]

    @property
    def done(self) -> list[Record]:
        """Records of the cells that are not run again."""
        return [cell.done for cell in self.cells if cell.done is not None]


def plan(options: RunOptions) -> Run:
    """What the options ask for, checked as far as can be without opening model or data. Raises `Usage`."""
    options.check()
    chosen = suite.load(options.suite) if options.suite is not None else suite.adhoc(options.recipe or "")
    data = sources.data(options.data)
    store = Store(options.folder)
    store.check()
    placement = place(options.device, options.threads, options.jobs, options.tier)
    tier = chosen.plan(placement.tier, options.recipes)
    models = [options.model] if options.model is not None else tier.models
    kind = placement.devices[0].name.partition(":")[0]
    settings = tier.settings | {
        "device": kind,  # which of several that are alike does not matter
        "machine": placement.machine,
        "threads": placement.threads,
        "dtype": options.dtype or ("float32" if kind == "cpu" else None),
    }
    if options.limit is not None:
        settings["limit"] = options.limit
    if options.probes is not None:
        wanted = [name.strip() for name in options.probes.split(",")]
        for name in wanted:
            one_of("probe", name, probes.names())
        settings["probes"] = [name for name in probes.names() if name in wanted]
    records, notes = store.read(chosen.name, chosen.version)
    standing = latest(records)
    places = tuple(Place(device.name, gate_file(device), device.visible) for device in placement.devices)
    seeds = options.seeds or tier.seeds
    cells: list[Planned] = []
    for source in [sources.model(name, options.tokenizer) for name in models]:
        for recipe in tier.recipes:
            for seed in seeds if seeded(recipe) else seeds[:1]:
                cell = Cell(
                    suite=chosen.name,
                    suite_version=chosen.version,
                    tier=placement.tier,
                    recipe=recipe.name,
                    steps=str(recipe),
                    resolved=tuple(recipe.resolved()),
                    model=source.name,
                    data=data.name,
                    seed=seed,
                    settings=settings,
                    digests=digests(recipe, settings["probes"], source.digest, data.digest),
                )
                cells.append(_planned(Job(cell, source, data, places), standing))
    return Run(chosen, placement.tier, tier.budget_minutes, placement, tuple(cells), (*placement.notes, *notes))


def digests(recipe: Recipe, taken: Sequence[str], model: str, data: str) -> dict[str, str]:
    """Digests of all that decides a cell's numbers and is not written in the cell itself. Raises `Usage`.

    Source is digested from its roots: what opens a model, every probe that is taken, and every method with the
    service of its kind. All rows of a table share the first two; `method.` and `files` are a row's own.
    """
    shared = {
        "model": model,
        "data": data,
        "tasks": sources.task_digest(),
        "open": digest_source("effbench.nn.files.load"),
        **{f"probe.{name}": digest_source(f"effbench.probes.{name}") for name in taken},
    }
    own = {f"method.{step.key}": _digest_method(step) for step in recipe.steps}
    files = [path for step in recipe.steps for path in step.files()]
    if files:
        own["files"] = _joined(map(_file_digest, files))
    return shared | own


def _digest_method(step: Method) -> str:
    """Digest of the source of a method and of what serves its kind."""
    service = f"effbench.nn.kinds.{kind_of(type(step)).lower()}"
    return digest_source(type(step).__module__, *([service] if find_file(service) else []))


def _planned(job: Job, standing: dict[str, Record]) -> Planned:
    """Whether a cell has to run, and why, given the last record of every cell."""
    cell = job.cell
    before = standing.get(cell.identity)
    if before is not None and before.outcome not in RETRIED:
        # Rows may have been renamed since; what was measured is the same.
        return Planned(job, f"done: {before.outcome}", dataclasses.replace(before, cell=cell))
    if before is not None:
        again = dataclasses.replace(job, attempt=before.attempt + 1)
        return Planned(again, f"{before.outcome} before: attempt {again.attempt}")
    row = (cell.recipe, cell.model, cell.seed, cell.tier)
    older = [
        record
        for record in standing.values()
        if (record.cell.recipe, record.cell.model, record.cell.seed, record.cell.tier) == row
    ]
    if not older:
        return Planned(job, "new")
    newest = max(older, key=lambda record: record.started)
    return Planned(job, f"changed: {', '.join(_changes(newest.cell, cell))}")


def _changes(old: Cell, new: Cell) -> list[str]:
    """Names of what differs between two cells of one row."""
    before, after = _flat(old), _flat(new)
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _flat(cell: Cell) -> dict[str, Any]:
    return {"steps": cell.steps, "data": cell.data, "parameters": list(cell.resolved), **cell.settings} | {
        f"digest of {name}": value for name, value in cell.digests.items()
    }


def _file_digest(path: Path) -> str:
    try:
        return sources.file_digest(path)
    except OSError as error:
        raise Usage(f"{path}: cannot be read ({error.strerror})") from None


def _joined(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
