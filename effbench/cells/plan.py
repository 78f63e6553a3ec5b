"""From a suite to jobs: which cells a command asks for, and which of them have to run.

Cells are planned from models, seeds and recipes. Those with a final record are left out, the others run in processes
of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from effbench import probes, sources
from effbench.cells import suite as suites
from effbench.cells.job import Job, Place
from effbench.cells.options import RunOptions
from effbench.cells.suite import Suite, Tier, seeded
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.files import file_digest
from effbench.core.kinds import Select, kind_of, service
from effbench.core.method import Method
from effbench.core.packages import module_file
from effbench.core.paths import PUBLISHED
from effbench.core.provenance import digest_source
from effbench.core.recipe import Recipe, parse
from effbench.core.registry import blame_method
from effbench.core.usage import one_of
from effbench.machine import environment
from effbench.machine.gate import gate_file
from effbench.machine.placement import Placement, place
from effbench.records.record import RETRIED, Cell, Record
from effbench.records.store import Store, latest
from effbench.sources import DataSource, Source
from effbench.sources.protocols import TEXT_TOKENS, WINDOW

METHOD = "method."  # begins the name of a method's digest
FILES = "files"  # names the digest of what methods read, which only they can list


@dataclasses.dataclass(frozen=True)
class Planned:
    """A cell of a batch: to be run for a reason, or done and not run again."""

    job: Job
    why: str
    done: Record | None = None
    row: Record | None = None  # the newest of the same row, whatever has changed since


@dataclasses.dataclass(frozen=True)
class Batch:
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


def plan(options: RunOptions, changes: Mapping[str, Any] | None = None, again: bool = False) -> Batch:
    """What the options ask for, checked as far as can be without reading weights or data.

    `changes` are settings that differ from those of the suite. With `again`, cells that are done run anew. Raises
    `Usage`.
    """
    placement, suite, tier, jobs = find_jobs(options, changes)
    return _decide(options, placement, suite, tier, jobs, again)


def plan_recipes(options: RunOptions, recipes: Sequence[Recipe], settings: Mapping[str, Any], again: bool) -> Batch:
    """Recipes of nobody's suite beside the baseline, with settings of their own; else as `plan`. Raises `Usage`."""
    placement = place(options.device, options.threads, options.jobs, options.tier)
    suite = suites.adhoc()
    baseline = suite.recipes[0]
    rows = (baseline, *(recipe for recipe in recipes if recipe.steps))
    tier = Tier(rows, (0,), (options.model or "tiny",), suites.resolve(settings))
    return _decide(options, placement, suite, tier, list(_jobs(options, placement, suite, tier)), again)


def _decide(
    options: RunOptions, placement: Placement, suite: Suite, tier: Tier, jobs: Sequence[Job], again: bool
) -> Batch:
    """The batch of all these jobs, of which some may be done. Raises `Usage`."""
    store = Store(options.folder)
    store.check()
    records, notes = store.read(suite.name, suite.version)
    before = _Before(records, again)
    cells = tuple(map(before.decide, jobs))
    todo = [cell.job for cell in cells if cell.done is None]
    if todo:
        _check_tasks(tier.settings.get("tasks"), todo[0].data)
        _check_parts(todo)
    for source in dict.fromkeys(job.source for job in todo):
        check_files(source, tier.settings["probes"])
    return Batch(suite, placement.tier, tier.budget_minutes, placement, cells, (*placement.notes, *notes))


def expect_seconds(batch: Batch) -> dict[str, float]:
    """What cells that are to run will take, by identity: what their rows took before, here or as published."""
    todo = [cell for cell in batch.cells if cell.done is None]
    rows = [cell.row for cell in todo if cell.row is not None]
    if len(rows) < len(todo) and PUBLISHED is not None and PUBLISHED.is_dir():
        rows = Store(PUBLISHED).read(batch.suite.name, batch.suite.version)[0] + rows
    took = {_place_of(record.cell): record.seconds for record in rows if record.outcome == "ok"}
    places = {cell.job.cell.identity: _place_of(cell.job.cell) for cell in todo}
    return {identity: took[row] for identity, row in places.items() if row in took}


def check_models(jobs: Sequence[Job]) -> None:
    """Raise `Unavailable` where the model of a job cannot be had: no cell would come further than that."""
    for source in dict.fromkeys(job.source for job in jobs):
        sources.check_reach(source)


def find_jobs(
    options: RunOptions, changes: Mapping[str, Any] | None = None
) -> tuple[Placement, Suite, Tier, list[Job]]:
    """All cells that the options ask for, in the order of the suite, and what they are taken from. Raises `Usage`."""
    options.check()
    placement = place(options.device, options.threads, options.jobs, options.tier)
    suite, tier = _choose_rows(options, placement.tier)
    tier = tier.with_settings(_settings(options, changes or {}))
    return placement, suite, tier, list(_jobs(options, placement, suite, tier))


def _choose_rows(options: RunOptions, tier: str) -> tuple[Suite, Tier]:
    """The suite, and its tier with the rows that the options name and the recipe that they bring."""
    suite = suites.load(options.suite) if options.suite is not None else suites.adhoc()
    rows = suite.tier(tier, options.recipes)
    return suite, rows if options.recipe is None else rows.with_row(suite.row(options.recipe))


def _settings(options: RunOptions, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the options change."""
    settings = dict(changes)
    for name in ("limit", "probes"):
        if getattr(options, name) is not None and name in changes:
            raise Usage(f"{name} is given twice: once as an option and once with --set")
    if options.limit is not None:
        settings["limit"] = options.limit
    if options.probes is not None:
        settings["probes"] = [name.strip() for name in options.probes.split(",")]
    for name in settings.get("probes", []):
        one_of("probe", name, probes.names())
    if "probes" in settings:
        settings["probes"] = [name for name in probes.names() if name in settings["probes"]]
    return settings


def _jobs(options: RunOptions, placement: Placement, suite: Suite, tier: Tier) -> Iterator[Job]:
    """Every cell of a tier with what it takes to run it: models, then seeds, then recipes.

    So a stop leaves whole tables of fewer seeds, and settings are chosen before other seeds need them.
    """
    kind = placement.devices[0].name.partition(":")[0]
    by_token = {"score_block": 1} if any(map(changes_caches, tier.recipes)) else {}
    settings = (
        by_token
        | tier.settings
        | {
            "device": kind,  # which of several that are alike does not matter
            "machine": placement.machine,
            "host": environment.host(),
            "threads": placement.threads,
            "dtype": options.dtype or ("float32" if kind == "cpu" else None),
        }
    )
    places = tuple(Place(device.name, gate_file(device), device.visible) for device in placement.devices)
    models = tier.models if options.model is None else (options.model,)
    seeds = options.seeds or tier.seeds
    data = sources.data(options.data or tier.data, options.calibration_data)
    for source in [sources.model(name, options.tokenizer) for name in models]:
        _check_positions(settings, source)
        _check_windows(settings, source, data)
        for recipe in tier.recipes:
            if kind != "cpu" and recipe.ranks > len(places):
                raise Usage(f"{recipe.name}: takes {recipe.ranks} ranks, a GPU each, and there are {len(places)}")
        for seed, recipe in itertools.product(seeds, tier.recipes):
            if seed != seeds[0] and not seeded(recipe):
                continue
            cell = Cell(
                suite=suite.name,
                suite_version=suite.version,
                tier=placement.tier,
                recipe=recipe.name,
                steps=str(recipe),
                resolved=tuple(recipe.resolved()),
                model=source.name,
                data=data.shown,
                seed=seed,
                settings=_settle(settings, recipe),
                digests=digests(recipe, settings["probes"], source.digest, data.digest),
            )
            alone = kind == "cpu" and recipe.ranks * placement.threads > placement.cores
            yield Job(
                cell,
                source,
                data,
                places,
                ranks=recipe.ranks,
                scratch=options.folder / "scratch" / cell.identity,
                cache=options.folder / "cache",
                probes=choose_probes(settings["probes"], recipe, alone),
            )


def _settle(settings: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Settings of one row: with the points of its grid."""
    return settings | ({"tune": [str(Recipe("", steps)) for steps in recipe.grid]} if recipe.grid else {})


def changes_caches(recipe: Recipe) -> bool:
    """Whether it is scored token by token, as then all rows beside it are."""
    return any("cache" in step.touches for step in recipe.steps)


def choose_probes(wanted: Sequence[str], recipe: Recipe, crowded: bool) -> tuple[str, ...]:
    """The probes that say something of a row: those that see all that it changes, unless none does, and then they say
    so; without those that time where ranks share cores."""
    touched = frozenset[str]().union(*(step.touches for step in recipe.steps))
    seeing = [name for name in wanted if touched <= probes.sees(name)]
    return tuple(name for name in seeing or wanted if not (crowded and name in probes.EXCLUSIVE))


def _check_positions(settings: Mapping[str, Any], source: Source) -> None:
    """Raise `Usage` for a setting that asks for more tokens than the model can see, where that is known.

    Settings that only probes read count where such a probe is taken.
    """
    if (positions := source.positions) is None:
        return
    new, taken = settings.get("speed_new_tokens", 1), settings["probes"]
    tokens = {"calibration_length": settings.get("calibration_length", 0)}  # a model is not opened for more
    if probes.WINDOWED.intersection(taken):
        tokens["window"] = settings.get("window", 0)
    if probes.POINTED.intersection(taken):
        tokens["speed_points"] = max((context + new for _, context in settings.get("speed_points", [])), default=0)
    if long := {name: count for name, count in tokens.items() if count > positions}:
        counts = ", ".join(f"{name} takes {count} tokens" for name, count in long.items())
        fitting = " ".join(f"--set {name}=null" for name in long)
        raise Usage(f"{counts}, and the model {source.name} has {positions} positions; {fitting} takes what fits")


def _check_windows(settings: Mapping[str, Any], source: Source, data: DataSource) -> None:
    """Raise `Usage` for windows that would leave tokens out, or that the text is too short for by `text_tokens`."""
    default = data.protocol.window if data.protocol is not None else WINDOW
    fitting = None if source.positions is None else min(default, source.positions)
    window = settings.get("window", fitting)
    if window is None or not probes.WINDOWED.intersection(settings["probes"]):
        return
    if (stride := settings.get("stride", window)) > window:
        raise Usage(
            f"stride={stride}: is more than the window, {window} tokens, and would leave tokens out; "
            f"--set stride={window} or less, or a larger window"
        )
    text = settings.get("text_tokens", TEXT_TOKENS if data.protocol is None else window)
    if text < window:
        raise Usage(
            f"text_tokens={text}: is less than the window, {window} tokens; --set text_tokens={window} or more, or a "
            "smaller window"
        )


def check_files(source: Source, taken: Sequence[str]) -> None:
    """Raise `Usage` for a model of one's own that cannot be opened, as far as that shows without its weights."""
    if source.kind not in ("folder", "gguf") or sources.is_fetched(source):
        return
    from effbench.nn.files.load import check_model  # torch and transformers, which other plans do without

    try:
        check_model(source, bool(probes.WINDOWED.intersection(taken)))
    except (Refused, Unsupported) as error:
        prefix = "gguf:" if source.kind == "gguf" else ""
        raise Usage(f"model={prefix}{source.location}: {error}") from None


def _check_parts(jobs: Iterable[Job]) -> None:
    """Raise `Usage` for a selection that looks at a part that the data does not have. The Hub is not asked."""
    asking = dict[tuple[DataSource, bool], dict[Select, None]]()
    for job in jobs:
        steps = parse(job.cell.steps, job.cell.recipe).steps
        for step in itertools.chain.from_iterable((step, *step.parts) for step in steps):
            if isinstance(step, Select) and step.needs_part and (job.data.learned or job.data).kind != "hub":
                asking.setdefault((job.data, job.source.kind == "shape"), {})[step] = None
    for (source, random), asked in asking.items():
        from effbench.nn.data import RandomTokens, open_data  # torch, which other plans do without

        data = RandomTokens(1) if random else open_data(source, None)
        for select in asked:
            assert select.needs_part
            select.require_part(data.has(select.needs_part), data.name if random else (source.learned or source).name)


def _check_tasks(tasks: Sequence[str] | None, data: DataSource) -> None:
    """Raise `Usage` for a task that neither the data nor lm-eval has."""
    if tasks is None:
        return
    from effbench.sources.tasks import index_tasks

    known = index_tasks(tasks, data.task_folders).all_tasks
    for name in tasks:
        one_of("task", name, known)


def digests(recipe: Recipe, taken: Sequence[str], model: str, data: str) -> dict[str, str]:
    """Digests of all that decides a cell's numbers and is not written in the cell itself. Raises `Usage`.

    Source is digested from its roots: what opens a model, every probe that is taken, and every method, with those that
    it calls itself and the services of their kinds. All rows of a table share the first two; `method.` and `files` are
    a row's own.
    """
    steps = [part for step in recipe.steps for part in (step, *step.parts)]
    own = {f"{METHOD}{step.key}": digest_method(type(step).__module__, kind_of(type(step))) for step in steps}
    files = [path for step in steps for path in _list_files(step)]
    if files:
        own[FILES] = _joined(map(_file_digest, files))
    return digest_shared(taken, model, data) | own


def _list_files(step: Method) -> list[Path]:
    """The files that a method reads. Raises `Usage` where its own code fails or gives no paths."""
    with blame_method(step.key):
        files = list(step.files())
        if not all(isinstance(path, Path) for path in files):
            raise TypeError(f"files() gives {files!r}: they must be paths")
    return files


def digest_shared(taken: Sequence[str], model: str, data: str) -> dict[str, str]:
    """The digests that do not depend on a recipe. Raises `ValueError` for a probe that is none."""
    return {
        "model": model,
        "data": data,
        "tasks": sources.task_digest(),
        "open": digest_source("effbench.nn.files.load"),
        **{f"probe.{name}": digest_source(f"effbench.probes.{name}") for name in taken},
    }


def digest_method(module: str, kind: str) -> str:
    """Digest of the source of a method, by its module, and of what serves its kind."""
    serving = service(kind)
    return digest_source(module, *([serving] if module_file(serving) else []))


class _Before:
    """Records of earlier runs, which say whether a cell has to run and why."""

    def __init__(self, records: Sequence[Record], again: bool) -> None:
        self._again = again
        self._standing = latest(records)
        self._attempts: dict[str, int] = {}  # identity: the last attempt
        for record in records:
            identity = record.cell.identity
            self._attempts[identity] = max(record.attempt, self._attempts.get(identity, 0))
        self._rows: dict[tuple[Any, ...], Record] = {}  # row: its newest record, whatever has changed since
        for record in sorted(self._standing.values(), key=lambda record: record.started):
            self._rows[_place_of(record.cell)] = record

    def decide(self, job: Job) -> Planned:
        """Whether a cell has to run, and why."""
        return dataclasses.replace(self._decide(job), row=self._rows.get(_place_of(job.cell)))

    def _decide(self, job: Job) -> Planned:
        cell = job.cell
        record = self._standing.get(cell.identity)
        if record is None:
            older = self._rows.get(_place_of(cell))
            return Planned(job, f"changed: {', '.join(_changes(older.cell, cell))}" if older is not None else "new")
        lost = record.metrics and not (record.protocols and record.environment)  # nobody knows how it was measured
        if record.outcome not in RETRIED and not self._again and not lost:
            # Rows may have been renamed since; what was measured is the same.
            return Planned(job, f"done: {record.outcome}", dataclasses.replace(record, cell=cell))
        next_attempt = dataclasses.replace(job, attempt=self._attempts[cell.identity] + 1)
        why = "how it was measured is lost" if lost else f"{record.outcome} before"
        return Planned(next_attempt, f"{why}: attempt {next_attempt.attempt}")


def _place_of(cell: Cell) -> tuple[Any, ...]:
    """What tells the rows of a suite apart, whatever has changed since."""
    return cell.recipe, cell.model, cell.seed, cell.tier


def _changes(old: Cell, new: Cell) -> list[str]:
    """Names of what differs between two cells of one row; the digest of a probe only where both take it."""
    before, after = _flat(old), _flat(new)
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return sorted(name for name in names if not name.startswith("digest of probe.") or name in before.keys() & after)


def _flat(cell: Cell) -> dict[str, Any]:
    return {"steps": cell.steps, "data": cell.data, "parameters": list(cell.resolved), **cell.settings} | {
        f"digest of {name}": value for name, value in cell.digests.items()
    }


def _file_digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise Usage(f"{path}: cannot be read ({error.strerror})") from None


def _joined(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
