"""Suites: which recipes to run, on which models, with which seeds and settings, as YAML in `suites/<name>.yaml`.

Everything is checked when a suite is loaded, every step parsed, so that a mistake in the last row shows
before the first one runs. Mistakes are `Usage` that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from effbench import probes, sources
from effbench.cells.options import TIERS
from effbench.core import plain_yaml
from effbench.core.errors import Usage
from effbench.core.kinds import Weights
from effbench.core.paths import SUITES
from effbench.core.recipe import Recipe, parse, unique
from effbench.core.usage import Count, Positive, Seed, named_path, nearest, one_of, typed
from effbench.records.shared import ENVIRONMENTS

BASELINE = "baseline"  # the row of no steps that every suite has
ADHOC = "adhoc"  # the suite of recipes that were given without one
NAME = re.compile(r"\w[\w.-]{0,63}")  # of a suite: records lie in a folder of this name

Pair = Annotated[list[Count], Meta(min_length=2, max_length=2)]
Tasks = Annotated[list[str], Meta(min_length=1)]
Tune = list[str] | dict[str, list[Any]]
Points = Annotated[list[Pair], Meta(min_length=1)]


@dataclasses.dataclass
class Settings:
    """How a suite measures; what is not set follows a probe's own default, which its version stands for."""

    probes: list[str] = dataclasses.field(default_factory=lambda: list(probes.names()))  # instruments; by default all
    calibration_sequences: Count = 128  # sequences that methods calibrate on
    calibration_length: Count | None = None  # tokens per calibration sequence; by default what the model takes
    skip: list[str] | None = None  # patterns of linears that methods leave alone
    tasks: Tasks | None = None  # lm-eval tasks; by default those that belong to the data
    chat_template: bool | None = None  # whether tasks are put as a user's turn by the model's template; by default not
    limit: Count | None = None  # items per task, windows of perplexity, texts that are drafted
    window: Annotated[int, Meta(ge=2)] | None = None  # tokens per window of perplexity
    stride: Count | None = None  # tokens from one window to the next; each scores its last so many; by default a window
    text_tokens: Count | None = None  # tokens of held-out text
    score_block: Count | None = (
        None  # tokens per forward pass after the context; by default all, or 1 beside rows that change caches
    )
    evict_at: Literal["prompt", "context"] | None = None  # caches settle before a prompt's last token, or its question
    memory_batch: Count | None = None  # sequences at a time where memory is measured
    memory_context: Count | None = None  # tokens before generation where memory is measured
    memory_new_tokens: Count | None = None  # tokens to generate where memory is measured
    speed_points: Points | None = None  # pairs [batch, context] at which speed is measured
    speed_new_tokens: Count | None = None  # tokens to generate where speed is measured
    speed_seconds: Positive | None = None  # seconds of timing per point
    flops_context: Count | None = None  # tokens for which operations are counted
    energy_seconds: Positive | None = None  # seconds of measuring energy per point, at least 5


@dataclasses.dataclass
class Template:
    """One row of a suite as written: a recipe, or several that differ in values put in for {KEY}."""

    name: str  # of the row, such as rtn-{bits}b
    steps: str  # its recipe, such as rtn(bits={bits})
    sweep: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # KEY: list of values; all combinations
    tune: Tune = dataclasses.field(default_factory=list)  # parameters such as fit.lr, or {fit.lr: [values to try]}


@dataclasses.dataclass
class Stage:
    """A tier of a suite as written."""

    recipes: list[str] = dataclasses.field(default_factory=lambda: ["*"])  # names of rows, or patterns; by default all
    seeds: list[Seed] = dataclasses.field(default_factory=lambda: [0])  # by default [0]
    models: list[str] = dataclasses.field(default_factory=lambda: ["tiny"])  # as in model=, which overrides them
    data: str | None = None  # as in data=, which overrides it; by default the world of tiny
    budget_minutes: Positive | None = None  # how long the tier may take on the machine that it is published for
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of this tier, over those of the suite


@dataclasses.dataclass
class SuiteFile:
    """A suite as written."""

    name: str  # that of the file
    version: Count  # to be raised when rows or settings change their meaning
    description: str  # one line
    recipes: list[Template]  # rows; the baseline is always there and needs none
    tiers: dict[str, Stage]  # some of quick, full and real
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of all tiers


@dataclasses.dataclass(frozen=True)
class Tier:
    """A tier, resolved."""

    recipes: tuple[Recipe, ...]  # baseline first
    seeds: tuple[int, ...]
    models: tuple[str, ...]
    settings: dict[str, Any]
    data: str | None = None
    budget_minutes: float | None = None

    def with_row(self, recipe: Recipe) -> Tier:
        """The tier with `recipe` as its last row, if it is not one already."""
        return self if recipe in self.recipes else dataclasses.replace(self, recipes=(*self.recipes, recipe))

    def with_settings(self, changes: Mapping[str, Any]) -> Tier:
        """The tier with some settings changed; None takes a probe's own default. Raises `Usage`."""
        return dataclasses.replace(self, settings=resolve(self.settings | dict(changes)))


@dataclasses.dataclass(frozen=True)
class Suite:
    """Recipes with what to measure on them."""

    name: str
    version: int
    description: str
    recipes: tuple[Recipe, ...]  # baseline first
    tiers: dict[str, Tier]

    def tier(self, name: str, rows: str | None = None) -> Tier:
        """The tier, cut to the rows that `rows` names (patterns separated by commas). Raises `Usage`."""
        one_of("tier", name, self.tiers)
        tier = self.tiers[name]
        if rows is None:
            return tier
        chosen = [tier.recipes[0]]
        for pattern in map(str.strip, rows.split(",")):
            matching = _matching(pattern, tier.recipes)
            if not matching:
                hint = self.tell_tiers(pattern) or nearest(pattern, [recipe.name for recipe in tier.recipes])
                raise Usage(f"recipes={rows}: no row of {self.name} in tier {name} matches {pattern!r}{hint}")
            chosen += [recipe for recipe in matching if recipe not in chosen]
        return dataclasses.replace(tier, recipes=tuple(chosen))

    def tell_tiers(self, pattern: str) -> str:
        """Words that name the tiers with a row of that pattern; empty if none has one."""
        having = [name for name, tier in self.tiers.items() if _matching(pattern, tier.recipes)]
        return f" (the {' and the '.join(having)} tier {'have' if len(having) > 1 else 'has'} it)" if having else ""

    def row(self, steps: str) -> Recipe:
        """The recipe of `steps`: that of the row with the same steps, or a new one named by them. Raises `Usage`."""
        name = steps.strip()
        if name.removesuffix("()") == BASELINE:
            raise Usage(f"recipe={steps}: the baseline is the row of no steps, which always runs; name a step")
        if not name.endswith(")") and any(row.name == name for row in self.recipes):
            raise Usage(f"recipe={steps}: is the name of a row, not its steps; recipes={name} chooses it")
        recipe = parse(steps).check_fits()
        if not recipe.steps:
            raise Usage("recipe=: name at least one step")
        return next((row for row in self.recipes if row.steps == recipe.steps), _named(recipe, recipe.label))


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
        if path.stem in (*names(), ADHOC, ENVIRONMENTS) and path.resolve().parent != SUITES.resolve():
            raise Usage(f"effbench keeps records of its own as {path.stem!r}: rename the file, and its `name:` alike")
        return _suite(typed(SuiteFile, _read(path)), path.stem)
    except Usage as error:
        raise Usage(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def adhoc() -> Suite:
    """The suite that recipes from the command line are rows of where no other is named: nothing but the baseline."""
    tiers = {tier: Stage() for tier in TIERS} | {"real": Stage(models=["smollm2"], data="speeches")}
    return _suite(SuiteFile(ADHOC, 1, "Recipes from the command line", [], tiers), ADHOC)


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are complete and right; what is not set is left out. Raises `Usage`."""
    resolved = typed(Settings, settings)
    for probe in resolved.probes:
        one_of("probe", probe, probes.names())
    if not resolved.probes:
        raise Usage(f"probes: name at least one of {', '.join(probes.names())}")
    return {name: value for name, value in dataclasses.asdict(resolved).items() if value is not None}


def seeded(recipe: Recipe) -> bool:
    """Whether a recipe's numbers depend on the seed; rounding weights without data does not."""
    return any(not isinstance(step, Weights) or step.needs for step in recipe.steps)


def _named(recipe: Recipe, name: str) -> Recipe:
    return dataclasses.replace(recipe, name=name)


def _path(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = named_path("suite", name)
        if not path.is_file():
            raise Usage(f"suite={name}: no such file")
        return path
    if name not in names():
        raise Usage(f"unknown suite {name!r}{nearest(name, names())}; one of your own is given as suite=FILE.yaml")
    return SUITES / f"{name}.yaml"


def _read(path: Path) -> dict[str, Any]:
    try:
        body = plain_yaml.read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, Usage) as error:
        raise Usage(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(body, dict):
        raise Usage(f"{path}: must hold keys such as name, version, recipes, tiers")
    return body


def _suite(file: SuiteFile, stem: str) -> Suite:
    if file.name != stem or not NAME.fullmatch(file.name):
        raise Usage(f"name: must be that of the file, {stem!r}, and at most 64 letters, digits, dots and dashes")
    if not file.tiers:
        raise Usage(f"tiers: is empty; name {' or '.join(TIERS)}")
    recipes = unique([Recipe(BASELINE, ()), *itertools.chain.from_iterable(map(_recipes, file.recipes))])
    steps: dict[str, str] = {}
    for recipe in recipes:
        same = f"{recipe} {recipe.grid}"  # a row may stand beside itself, tuned
        if same in steps:
            raise Usage(f"recipes: {steps[same]!r} and {recipe.name!r} have the same steps")
        steps[same] = recipe.name
    for tier in file.tiers:
        if tier not in TIERS:
            raise Usage(f"tiers.{tier}: unknown tier{nearest(tier, TIERS)}")
    tiers = {tier: _tier(tier, stage, recipes, file.settings) for tier, stage in file.tiers.items()}
    return Suite(file.name, file.version, file.description, tuple(recipes), tiers)


def _recipes(template: Template) -> Iterator[Recipe]:
    """The recipes of a template: one, or one per combination of the values it sweeps."""
    for values in itertools.product(*template.sweep.values()):
        name, steps = template.name, template.steps
        for key, value in zip(template.sweep, values, strict=True):
            name, steps = name.replace(f"{{{key}}}", str(value)), steps.replace(f"{{{key}}}", repr(value))
        if not name.strip() or not name.isprintable():
            raise Usage(f"recipes: {name!r} is no name for a row")
        try:
            yield parse(steps, name).check_fits().tuned(template.tune)
        except Usage as error:
            raise Usage(f"recipes.{name}: {error}") from None


def _tier(name: str, stage: Stage, recipes: list[Recipe], settings: dict[str, Any]) -> Tier:
    for key, values in (("recipes", stage.recipes), ("seeds", stage.seeds), ("models", stage.models)):
        if not values:
            raise Usage(f"tiers.{name}.{key}: is empty")
        if len(set(values)) < len(values):
            raise Usage(f"tiers.{name}.{key}: names one of them twice")
    for model in stage.models:
        try:
            sources.model(model)
        except Usage as error:
            raise Usage(f"tiers.{name}.models: {error}") from None
    try:
        sources.data(stage.data)
    except Usage as error:
        raise Usage(f"tiers.{name}.data: {error}") from None
    chosen = {BASELINE}
    for pattern in stage.recipes:
        matching = _matching(pattern, recipes)
        if not matching:
            hint = nearest(pattern, [recipe.name for recipe in recipes])
            raise Usage(f"tiers.{name}.recipes: no row matches {pattern!r}{hint}")
        chosen |= {recipe.name for recipe in matching}
    try:
        resolved = resolve(settings | stage.settings)
    except Usage as error:
        raise Usage(f"settings of tier {name}: {error}") from None
    rows = tuple(recipe for recipe in recipes if recipe.name in chosen)
    return Tier(rows, tuple(stage.seeds), tuple(stage.models), resolved, stage.data, stage.budget_minutes)


def _matching(pattern: str, recipes: Iterable[Recipe]) -> list[Recipe]:
    return [recipe for recipe in recipes if fnmatch.fnmatchcase(recipe.name, pattern)]
