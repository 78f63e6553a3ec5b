"""Records as data frames of pandas: what `effbench.records` and `effbench.samples` give."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.core.errors import Usage
from effbench.core.paths import PUBLISHED, RUNS
from effbench.core.usage import matches_any, nearest, one_of
from effbench.records.imported import is_imported
from effbench.records.record import OUTCOMES, Record
from effbench.records.store import Store, latest
from effbench.report.groups import get_host, get_machine
from effbench.report.metrics import natural_key

if TYPE_CHECKING:
    import pandas as pd

    Folder = str | PathLike[str] | None

KEYS = ("suite", "suite_version", "tier", "recipe", "model", "seed")  # of the samples of one record
BOUNDS = ("low", "high", "n")


def make_records(
    results: Folder = None,
    *,
    suite: str | None = None,
    tier: str | None = None,
    model: str | None = None,
    recipe: str | Sequence[str] | None = None,
    outcome: str | None = None,
    intervals: bool = False,
) -> pd.DataFrame:
    """A row for the last attempt at every cell; see `effbench.records`."""
    import pandas as pd

    chosen = _select(results, suite, tier, model, recipe, outcome)
    names = sorted({name for record in chosen for name in record.metrics}, key=natural_key)
    columns: dict[str, list[Any]] = {name: [] for name in _describe(chosen[0])}
    for record in chosen:
        for name, value in _describe(record).items():
            columns[name].append(value)
    for name in names:
        metrics = [record.metrics.get(name) for record in chosen]
        columns[name] = [None if one is None else one.value for one in metrics]
        for bound in BOUNDS if intervals else ():
            columns[f"{name}_{bound}"] = [None if one is None else getattr(one, bound) for one in metrics]
    frame = pd.DataFrame(columns)
    numbers = {name: "float64" for name in frame.columns[len(_describe(chosen[0])) :]}
    return frame.astype(numbers).astype({"simulated": "bool", "imported": "bool", "seed": "int64"})


def make_samples(
    name: str,
    results: Folder = None,
    *,
    suite: str | None = None,
    tier: str | None = None,
    model: str | None = None,
    recipe: str | Sequence[str] | None = None,
) -> pd.DataFrame:
    """A row for every item of every record; see `effbench.samples`."""
    import pandas as pd

    chosen = _select(results, suite, tier, model, recipe, None)
    parts = []
    for record in chosen:
        values = record.samples.get(name)
        if values is None:
            continue
        wide = [value if isinstance(value, (list, tuple)) else [value] for value in values]
        columns = ["value"] if all(len(value) == 1 for value in wide) else None
        part = pd.DataFrame(wide, columns=columns).rename(columns=lambda key: key if key == "value" else f"value_{key}")
        part.insert(0, "item", range(len(part)))
        for place, key in enumerate(KEYS):
            part.insert(place, key, getattr(record.cell, key))
        parts.append(part)
    if not parts:
        known = {key for record in chosen for key in record.samples}
        raise Usage(f"samples {name!r}: no record has them{nearest(name, known)}")
    return pd.concat(parts, ignore_index=True)


def _select(
    results: Folder,
    suite: str | None,
    tier: str | None,
    model: str | None,
    recipe: str | Sequence[str] | None,
    outcome: str | None,
) -> list[Record]:
    """The last attempts at the cells that are meant. Raises `Usage` where there is none."""
    folder = _find_folder(results)
    one_of("outcome", outcome, OUTCOMES)
    store = Store(folder)
    suites = sorted({path.parent.name for path in store.folders()})
    one_of("suite", suite, suites)
    records, notes = store.read(suite)
    for note in notes:
        warnings.warn(note, stacklevel=4)
    for field, value in (("tier", tier), ("model", model)):
        one_of(field, value, dict.fromkeys(getattr(record.cell, field) for record in records))
    patterns = (recipe,) if isinstance(recipe, str) else recipe
    chosen = [
        record
        for record in latest(records).values()
        if _fits(record.cell.tier, tier)
        and _fits(record.cell.model, model)
        and _fits(record.outcome, outcome)
        and (patterns is None or _has_name(record, patterns))
    ]
    if not chosen:
        raise Usage(f"no records in {folder / 'records'} that fit; leave out what chooses among them")
    return chosen


def _fits(value: str, wanted: str | None) -> bool:
    """Whether a value is the one that is wanted, or none is."""
    return wanted is None or value == wanted


def _has_name(record: Record, patterns: Iterable[str]) -> bool:
    """Whether the name or the steps of a recipe fit; brackets stand for themselves, as in `effbench list records`."""
    patterns = tuple(patterns)
    return any(text in patterns or matches_any(text, patterns) for text in (record.cell.recipe, record.cell.steps))


def _find_folder(results: Folder) -> Path:
    """The folder that is meant: the one that is named, own records, else published ones. Raises `Usage`."""
    if results is not None:
        folder = Path(results).expanduser()
    else:
        folder = Path(RUNS) if Store(Path(RUNS)).folders() or PUBLISHED is None else PUBLISHED
    if not Store(folder).folders():
        raise Usage(f"no records in {folder / 'records'}; run `effbench run suite=quant` first, or name a folder")
    return folder


def _describe(record: Record) -> dict[str, Any]:
    """What was run and how it ended, before the metrics."""
    cell = record.cell
    return {
        **{key: getattr(cell, key) for key in ("suite", "suite_version", "tier", "recipe", "steps", "model", "data")},
        "seed": cell.seed,
        "outcome": record.outcome,
        "reason": record.reason,
        "simulated": record.simulated,
        "imported": is_imported(record),
        "machine": get_machine(record),
        "host": get_host(record),
        "started": record.started,
        "seconds": record.seconds,
        "record": record.name,
    }
