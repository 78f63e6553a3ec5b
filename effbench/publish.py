"""Publishing: own records of a complete tier become the published ones, and take the place of what they supersede.

Maintainers only. Nothing is published that a reader could not get again: no changes that are not committed, no other
source than the present one, no row or seed left out, no cell that would be tried again, and one host for all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from effbench import sources
from effbench.cells import suite as suites
from effbench.cells.lock import check_locked
from effbench.cells.stale import is_stale
from effbench.cells.suite import Suite, Tier, seeded
from effbench.core.errors import Usage
from effbench.machine.environment import source
from effbench.records.publication import publish_records, remove_unreferenced
from effbench.records.record import PLACE, RETRIED, Cell, Record
from effbench.records.store import Store
from effbench.report.groups import Row, Table, group_records
from effbench.report.pages import find_readme, load, write
from effbench.report.sheets import Stale


@dataclasses.dataclass(frozen=True)
class Publication:
    """The records of one tier of a suite on one model."""

    suite: str
    version: int
    tier: str
    model: str
    records: tuple[Record, ...]

    def __str__(self) -> str:
        return f"{self.suite} v{self.version}, {self.tier} tier, model {self.model}"


def publish(
    suite: str,
    runs: Path,
    results: Path,
    tier: str | None = None,
    stale: Stale | None = None,
) -> tuple[list[Publication], list[Path]]:
    """Publish a tier of a suite from own records; returns what was published and the generated files that changed.

    `stale` says which records are of another source than the present. Raises `Usage`, and changes nothing, for records
    that are not fit to be published.
    """
    chosen = suites.load(suite)
    publications = choose(chosen, load(runs, chosen.name), tier, is_stale if stale is None else stale)
    replace_published(publications, Store(results))
    return publications, write(results, None, find_readme(results))


def choose(chosen: Suite, records: Iterable[Record], tier: str | None, stale: Stale) -> list[Publication]:
    """What can be published of own records, a publication per model. Raises `Usage`."""
    check_locked(chosen)
    if source().get("dirty"):
        raise Usage("the source has changes that are not committed: commit them and run the suite again")
    records = [record for record in records if record.cell.suite_version == chosen.version]
    tier = _choose_tier(chosen, tier, {record.cell.tier for record in records})
    tables = group_records(record for record in records if record.cell.tier == tier)
    return [_choose_model(chosen, tier, model, tables, stale) for model in chosen.tiers[tier].models]


def _choose_tier(chosen: Suite, tier: str | None, measured: set[str]) -> str:
    there = [name for name in chosen.tiers if name in measured]
    if tier is None and len(there) > 1:
        raise Usage(f"tier=: there are own records of {' and '.join(there)}; name the one to publish")
    if tier is None and not there:
        raise Usage(f"no own records of {chosen.name} v{chosen.version}; run `effbench run suite={chosen.name}` first")
    tier = tier or there[0]
    if tier not in chosen.tiers:
        raise Usage(f"tier={tier}: {chosen.name} has {' and '.join(chosen.tiers)}")
    return tier


def _choose_model(chosen: Suite, tier: str, model: str, tables: Sequence[Table], stale: Stale) -> Publication:
    """The records of one model, complete and fit to be published. Raises `Usage`."""
    what = f"{chosen.name} v{chosen.version}, {tier} tier, model {model}"
    run_again = f"`effbench run suite={chosen.name} tier={tier}`"
    plan = chosen.tiers[tier]
    alike = [table for table in tables if table.cell.model == model and _is_as_planned(table.cell, plan)]
    if not alike:
        raise Usage(f"{what}: no own records with the settings of the suite; {run_again}")
    if len(alike) > 1:
        places = ", ".join(sorted(f"{table.host} ({_count_own(table)} cells)" for table in alike))
        raise Usage(f"{what}: measured on several hosts, or with several settings of one: {places}; keep one in runs=")
    rows = {row.steps: row for row in alike[0].rows if not row.elsewhere}
    due = {str(recipe): tuple(plan.seeds if seeded(recipe) else plan.seeds[:1]) for recipe in plan.recipes}
    names = {str(recipe): recipe.name for recipe in plan.recipes}
    missing = [
        f"{names[steps]} seed {seed}"
        for steps, seeds in due.items()
        for seed in seeds
        if seed not in _list_seeds(rows.get(steps))
    ]
    if missing:
        raise Usage(f"{what}: {_name_some(missing)} not measured by the present source; {run_again}")
    records = [
        _rename(record, names[steps])
        for steps, seeds in due.items()
        for record in rows[steps].records
        if record.cell.seed in seeds
    ]
    for complaint, bad in (
        ("did not end and would be tried again", lambda record: record.outcome in RETRIED),
        ("measured with changes that are not committed, or by an installed package", _lacks_commit),
        ("measured by another source, model or data than the present", stale),
    ):
        cells = [f"{record.cell.recipe} seed {record.cell.seed}" for record in records if bad(record)]
        if cells:
            raise Usage(f"{what}: {_name_some(cells)} {complaint}; {run_again}")
    return Publication(chosen.name, chosen.version, tier, model, tuple(records))


def _is_as_planned(cell: Cell, plan: Tier) -> bool:
    """Whether a cell has the data and the settings that its tier has when nothing else is asked for."""
    settings = {name: value for name, value in cell.settings.items() if name not in PLACE and value is not None}
    dtype = {"dtype": "float32"} if cell.settings.get("device") == "cpu" else {}
    return cell.data == sources.data(plan.data).name and settings == plan.settings | dtype


def _count_own(table: Table) -> int:
    return sum(len(row.records) for row in table.rows if not row.elsewhere)


def _list_seeds(row: Row | None) -> set[int]:
    return set() if row is None else {record.cell.seed for record in row.records}


def _rename(record: Record, name: str) -> Record:
    """The record under the present name of its row."""
    return dataclasses.replace(record, cell=dataclasses.replace(record.cell, recipe=name))


def _lacks_commit(record: Record) -> bool:
    return record.environment.get("dirty") is not False or not record.environment.get("commit")


def _name_some(cells: Sequence[str]) -> str:
    """A few of many."""
    shown = ", ".join(cells[:3])
    return f"{shown} and {len(cells) - 3} more cells" if len(cells) > 3 else shown


# ---- what is published --------------------------------------------------------------------------


def replace_published(publications: Sequence[Publication], store: Store) -> None:
    """Write the publications of one tier of a suite as one, in the place of the tier's older one of any version."""
    first = publications[0]
    records = [record for publication in publications for record in publication.records]
    written = publish_records(records, store.results, first.tier)
    for folder in store.folders(first.suite):
        older = folder / written.name
        if older != written and folder.name != written.parent.name:
            older.unlink(missing_ok=True)
    remove_unreferenced(store)
