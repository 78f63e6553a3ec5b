"""Suites: which recipes to run, on which models, with which seeds and settings, as YAML in `suites/<name>.yaml`.

Everything is checked when a suite is loaded, every step parsed, so that a mistake in the last row shows
before the first one runs. Mistakes are `Usage` that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from effbench import probes, sources
from effbench.cells.options import TIERS
from effbench.core.errors import Usage
from effbench.core.kinds import Weights
from effbench.core.paths import SUITES
from effbench.core.recipe import Recipe, parse, unique
from effbench.core.usage import nearest, one_of, typed

BASELINE = "baseline"  # the row of no steps that every suite has


@dataclasses.dataclass
class Settings:
    """What probes are told; what is not set follows a probe's own default, which its version stands for."""

    probes: list[str] = dataclasses.field(default_factory=lambda: list(probes.names()))
    calibration_sequences: int = 128
    calibration_length: int | None = None  # tokens per calibration sequence
    skip: list[str] | None = None  # patterns of linears that methods leave alone
    tasks: list[str] | None = None  # lm-eval tasks; by default those that belong to the data
    limit: int | None = None  # items per task, windows of perplexity
    window: int | None = None  # tokens per window of perplexity
    text_tokens: int | None = None  # of held-out text
    score_block: int | None = None  # tokens per forward after the context
    memory_batch: int | None = None
    memory_context: int | None = None
    memory_new_tokens: int | None = None
    speed_points: list[Any] | None = None  # pairs [batch, context]
    speed_new_tokens: int | None = None
    speed_seconds: float | None = None  # per point
    flops_context: int | None = None
    energy_seconds: float | None = None


@dataclasses.dataclass
class Row:
    """One row of a suite as written: a recipe, or a template with values to put in."""

    name: str
    steps: str
    sweep: dict[str, list[Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Stage:
    """A tier of a suite as written."""

    recipes: list[str] = dataclasses.field(default_factory=lambda: ["*"])  # names or patterns
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    models: list[str] = dataclasses.field(default_factory=lambda: ["tiny"])  # unless model= names another
    budget_minutes: float | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class SuiteFile:
    """A suite as written."""

    name: str
    version: int
    description: str
    recipes: list[Row]
    tiers: dict[str, Stage]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    tables: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A tier, resolved."""

    recipes: tuple[Recipe, ...]  # baseline first
    seeds: tuple[int, ...]
    models: tuple[str, ...]
    settings: dict[str, Any]
    budget_minutes: float | None = None


@dataclasses.dataclass(frozen=True)
class Suite:
    """Recipes with what to measure on them."""

    name: str
    version: int
    description: str
    recipes: tuple[Recipe, ...]  # baseline first
    tiers: dict[str, Plan]
    tables: dict[str, Any] = dataclasses.field(default_factory=dict)

    def plan(self, tier: str, rows: str | None = None) -> Plan:
        """The tier, cut to the rows that `rows` names (patterns separated by commas). Raises `Usage`."""
        one_of("tier", tier, self.tiers)
        plan = self.tiers[tier]
        if rows is None:
            return plan
        chosen = [plan.recipes[0]]
        for pattern in rows.split(","):
            found = _matching(pattern.strip(), plan.recipes)
            if not found:
                other = " (the full tier has it)" if _matching(pattern.strip(), self.recipes) else ""
                names = [recipe.name for recipe in plan.recipes]
                hint = other or nearest(pattern, names)
                raise Usage(f"recipes={rows}: no row of {self.name} in tier {tier} matches {pattern!r}{hint}")
            chosen += [recipe for recipe in found if recipe not in chosen]
        return dataclasses.replace(plan, recipes=tuple(chosen))


def names() -> list[str]:
    """Suites that ship with effbench."""
    return sorted(path.stem for path in SUITES.glob("*.yaml") if path.stem != "presets")


def header(name: str) -> dict[str, Any]:
    """A suite's file as written, unchecked and without importing a method."""
    return dict(_read(_path(name)))


def load(name: str) -> Suite:
    """The suite of that name, or of that YAML file. Raises `Usage`."""
    path = _path(name)
    try:
        return _suite(typed(SuiteFile, _read(path)), path.stem)
    except Usage as error:
        raise Usage(f"{path}: {error}") from None


def adhoc(steps: str) -> Suite:
    """The suite of one recipe from the command line, with its baseline. Raises `Usage`."""
    recipe = parse(steps)
    if not recipe.steps:
        raise Usage("recipe=: name at least one step")
    rows, tiers = [Row(recipe.label, str(recipe))], {tier: Stage() for tier in TIERS}
    return _suite(SuiteFile("adhoc", 1, "Recipes from the command line", rows, tiers), "adhoc")


def seeded(recipe: Recipe) -> bool:
    """Whether a recipe's numbers depend on the seed; rounding weights without data does not."""
    return any(not isinstance(step, Weights) or step.needs for step in recipe.steps)


def _path(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.is_file() or path.stem == "presets":
        raise Usage(f"unknown suite {name!r}{nearest(name, names())}")
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Usage(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(body, dict):
        raise Usage(f"{path}: must hold keys such as name, version, recipes, tiers")
    return body


def _suite(file: SuiteFile, stem: str) -> Suite:
    if file.name != stem or not re.fullmatch(r"[\w.-]+", file.name):
        raise Usage(f"name: must be that of the file, {stem!r}")
    if file.version < 1:
        raise Usage(f"version: must be 1 or more, not {file.version}")
    recipes = unique([Recipe(BASELINE, ()), *itertools.chain.from_iterable(map(_recipes, file.recipes))])
    steps: dict[str, str] = {}
    for recipe in recipes:
        if str(recipe) in steps:
            raise Usage(f"recipes: {steps[str(recipe)]!r} and {recipe.name!r} have the same steps")
        steps[str(recipe)] = recipe.name
    tiers: dict[str, Plan] = {}
    for tier, stage in file.tiers.items():
        if tier not in TIERS:
            raise Usage(f"tiers.{tier}: unknown tier{nearest(tier, TIERS)}")
        tiers[tier] = _plan(tier, stage, recipes, file.settings)
    return Suite(file.name, file.version, file.description, tuple(recipes), tiers, file.tables)


def _recipes(row: Row) -> Iterator[Recipe]:
    """The recipes of a row: one, or one per combination of the values it sweeps."""
    for values in itertools.product(*row.sweep.values()):
        name, steps = row.name, row.steps
        for key, value in zip(row.sweep, values, strict=True):
            name, steps = name.replace(f"{{{key}}}", str(value)), steps.replace(f"{{{key}}}", repr(value))
        try:
            yield parse(steps, name)
        except Usage as error:
            raise Usage(f"recipes.{name}: {error}") from None


def _plan(tier: str, stage: Stage, recipes: list[Recipe], settings: dict[str, Any]) -> Plan:
    for name, value in (("recipes", stage.recipes), ("seeds", stage.seeds), ("models", stage.models)):
        if not value:
            raise Usage(f"tiers.{tier}.{name}: is empty")
    for model in stage.models:
        try:
            sources.model(model)
        except Usage as error:
            raise Usage(f"tiers.{tier}.models: {error}") from None
    chosen = {BASELINE}
    for pattern in stage.recipes:
        found = _matching(pattern, recipes)
        if not found:
            hint = nearest(pattern, [recipe.name for recipe in recipes])
            raise Usage(f"tiers.{tier}.recipes: no row matches {pattern!r}{hint}")
        chosen |= {recipe.name for recipe in found}
    try:
        resolved = typed(Settings, settings | stage.settings)
    except Usage as error:
        raise Usage(f"settings of tier {tier}: {error}") from None
    for probe in resolved.probes:
        one_of("probe", probe, probes.names())
    given = {name: value for name, value in dataclasses.asdict(resolved).items() if value is not None}
    rows = tuple(recipe for recipe in recipes if recipe.name in chosen)
    return Plan(rows, tuple(stage.seeds), tuple(stage.models), given, stage.budget_minutes)


def _matching(pattern: str, recipes: Iterable[Recipe]) -> list[Recipe]:
    return [recipe for recipe in recipes if fnmatch.fnmatchcase(recipe.name, pattern)]
