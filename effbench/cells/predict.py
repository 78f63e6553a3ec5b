"""`effbench plan`: the bytes that a recipe will hold on a model, and whether they fit, before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effbench import sources
from effbench.cells import suite as suites
from effbench.cells.options import DTYPES
from effbench.core import registry
from effbench.core.errors import Outcome, Usage
from effbench.core.method import Method
from effbench.core.recipe import Recipe
from effbench.core.usage import Count, one_of

if TYPE_CHECKING:
    from effbench.nn.rehearse import Held
    from effbench.sources import Source

UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)", re.IGNORECASE)


@dataclasses.dataclass
class PlanOptions:
    """What `effbench plan` can be told."""

    suite: str | None = None  # name of a suite, or a YAML file of your own: each of its rows
    recipe: str | None = None  # or the steps of one recipe
    model: str | None = None  # as in `effbench run`; shape:NAME needs no weights; else that of the suite, or tiny
    recipes: str | None = None  # only these rows of the suite: names or patterns, separated by commas
    ranks: Count | None = None  # processes that train together, by every engine in turn; of a recipe that names none
    memory: str | None = None  # of each process, such as 24GB or 80GiB; without it nothing is said to fit
    batch: Count | None = None  # examples of a step over all ranks, sequences in the cache; else those of the fit
    context: Count | None = None  # tokens of each; by default the max_length of the fit, as far as positions reach
    dtype: str | None = None  # of the arithmetic: float32, bfloat16, float16; by default as stored, as on a GPU
    tier: str = "quick"  # of the suite

    def check(self) -> None:
        """Raise `Usage` for values that cannot be right."""
        if (self.suite is None) == (self.recipe is None):
            raise Usage("give suite=NAME or recipe='nf4(), lora(), fit()'")
        if self.recipes is not None and self.suite is None:
            raise Usage("recipes= chooses rows of a suite; it goes with suite=")
        one_of("dtype", self.dtype, DTYPES)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one row will hold in each of its processes, or why that cannot be said."""

    recipe: str
    model: str
    ranks: int
    engine: str  # the step that says how processes divide what they hold; empty for one process
    dtype: str = ""
    batch: int | None = None
    context: int | None = None
    held: Held | None = None
    outcome: str = ""  # why there is nothing to tell


def parse_memory(text: str) -> int:
    """Bytes of a size such as 24GB (10^9) or 80GiB (2^30). Raises `Usage`."""
    match = SIZE.fullmatch(text.strip())
    size = 0.0 if match is None else float(match[1]) * (1024 if match[3] else 1000) ** UNITS[(match[2] or "").upper()]
    if size < 1:
        raise Usage(f"memory={text}: must be a size such as 24GB (10^9 bytes) or 80GiB (2^30)")
    return int(size)


def predict(options: PlanOptions) -> Iterator[Prediction]:
    """The predictions that the options ask for, in the order of the suite, each as it is found. Raises `Usage`."""
    options.check()
    recipes, models, tier = _choose(options)
    chosen = [(sources.model(name), recipe, _engines(recipe, options.ranks)) for name in models for recipe in recipes]
    skip = tuple(tier.get("skip") or ())
    return (found for one in chosen for found in _predict(options, *one, skip))


def _choose(options: PlanOptions) -> tuple[Sequence[Recipe], Sequence[str], Mapping[str, Any]]:
    """The recipes, models and settings that are meant."""
    if options.suite is None:
        assert options.recipe is not None
        return [suites.adhoc().row(options.recipe)], [options.model or "tiny"], {}
    tier = suites.load(options.suite).tier(options.tier, options.recipes)
    return tier.recipes, [options.model] if options.model else tier.models, tier.settings


def _engines(recipe: Recipe, ranks: int | None) -> list[Method | None]:
    """The engines to put before fits: none where the recipe has its own; else each that there is, if there are ranks.

    Raises `Usage` where the recipe takes other ranks.
    """
    own = [step for step in recipe.steps if "train.parallel" in step.slots()]
    for step in own:
        if ranks not in (None, step.ranks):
            what = f"{step} of {recipe.name} takes {step.ranks}"
            raise Usage(f"ranks={ranks}: {what}: leave ranks= out, or change the step")
    if own or ranks in (None, 1) or not any(step.consumes for step in recipe.steps):
        return [None]
    return [engine for key in registry.catalog() for engine in _settings_of(key, ranks)]


def _settings_of(key: str, ranks: int | None) -> Iterator[Method]:
    """An engine with so many ranks, at each of the settings that it has a choice of; nothing for other methods."""
    kind = registry.load(key)
    if "train.parallel" not in kind.claims or ranks is None:
        return
    hints = typing.get_type_hints(kind)
    choices = {
        field.name: typing.get_args(hints[field.name])
        for field in dataclasses.fields(kind)
        if typing.get_origin(hints[field.name]) is typing.Literal
    }
    for values in itertools.product(*choices.values()):
        yield kind(ranks=ranks, **dict(zip(choices, values, strict=True)))


def _predict(
    options: PlanOptions,
    source: Source,
    recipe: Recipe,
    engines: Sequence[Method | None],
    skip: tuple[str, ...],
) -> Iterator[Prediction]:
    """One recipe on one model, under each of the engines."""
    import torch

    from effbench.nn.rehearse import Batch, Rehearsals, make_case

    dtype = getattr(torch, options.dtype) if options.dtype else None
    rehearsals: Rehearsals | None = None
    for engine in engines:
        named = [*recipe.steps] if engine is None else [engine]
        own = [step for step in named if "train.parallel" in step.slots()]
        made = Prediction(
            recipe.name, source.name, max((step.ranks for step in own), default=1), own[-1].label if own else ""
        )
        try:
            if rehearsals is None:
                batch = Batch(options.batch, options.context)
                rehearsals = Rehearsals(make_case(source, recipe.steps, dtype, batch, skip))
            held = rehearsals.take(engine)
        except Outcome as error:
            yield dataclasses.replace(made, outcome=f"{error.name}: {error}")
        except Usage:
            raise
        except Exception as error:  # of a step that needs values, and says so in a way of its own
            why = f"cannot be foreseen: {type(error).__name__}: {error}".split("\n")[0]
            yield dataclasses.replace(made, outcome=why)
        else:
            case = rehearsals.case
            yield dataclasses.replace(
                made,
                dtype=str(case.dtype).removeprefix("torch."),
                batch=case.cached.batch,
                context=case.cached.context,
                held=held,
            )
