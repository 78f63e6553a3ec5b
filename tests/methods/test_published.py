"""A row of a suite that carries the bare name of a method is the published recipe, or its name says what differs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from effbench.cells import suite
from effbench.checks import check_facts
from effbench.core import registry
from effbench.core.kinds import Weights
from effbench.core.recipe import Recipe, parse

ROWS = [(name, recipe) for name in suite.names() for recipe in suite.load(name).recipes]


def spell(field: str, value: Any) -> str:
    """A value as names of rows have it: 4b for 4 bits, 2of4 for the pattern 2:4."""
    return f"{value}b" if field == "bits" else str(value).replace(":", "of")


def find_unnamed(recipe: Recipe) -> list[str]:
    """What a row named by a method and values of its fields alone does not share with the published recipe.

    Where there is no published recipe, the method's own defaults stand in for it, and its caveats have to say why.
    """
    key, *tokens = recipe.name.split("-")
    keys = [step.key for step in recipe.steps]
    if key not in registry.catalog() or (key not in keys and any(own.startswith(f"{key}_") for own in keys)):
        return []  # a method that begins with it: fp8-row is fp8_weight's
    values = {spell(name, value) for step in recipe.steps for name, value in dataclasses.asdict(step).items()}
    if not values.issuperset(tokens):
        return []  # the name says what differs
    cls = registry.load(key)
    if not cls.published and not cls.caveats:
        return ["neither published nor caveats"]
    own, published = recipe.steps, parse(cls.published or f"{key}()").steps
    if not cls.published:
        own = tuple(step for step in own if step.key == key)
    if [step.key for step in own] != [step.key for step in published]:
        return ["the steps"]
    return [
        name
        for mine, theirs in zip(own, published, strict=True)
        for name, value in dataclasses.asdict(mine).items()
        if value != getattr(theirs, name) and spell(name, value) not in tokens
    ]


@pytest.mark.parametrize(("name", "recipe"), ROWS, ids=[f"{name}-{recipe.name}" for name, recipe in ROWS])
def test_a_bare_name_is_the_published_recipe(name: str, recipe: Recipe) -> None:
    assert find_unnamed(recipe) == []


@pytest.mark.parametrize(
    ("row", "steps", "found"),
    [
        ("wanda-0.6", "wanda(sparsity=0.6, scope='local')", ["scope"]),
        ("wanda-local-0.6", "wanda(sparsity=0.6, scope='local')", []),
        ("sparsegpt-2of4", "sparsegpt(pattern='2:4', bits=4)", ["bits"]),
        ("sparsegpt-2of4-joint", "sparsegpt(pattern='2:4', bits=4)", []),
        ("gptq-4b", "wanda(), gptq(bits=4)", ["the steps"]),
        ("taylor-0.5", "taylor(average='gradient')", ["average"]),  # no published recipe: against the defaults
        ("taylor-snip-0.5", "taylor(average='gradient')", []),
        ("learned_mask-2of4", "learned_mask(), fit(steps=100)", ["the steps"]),
        (
            "movement-0.85",
            "movement(sparsity=0.85), fit(steps=100)",
            ["steps", "lr", "batch_size", "schedule", "warmup"],
        ),
        ("movement-0.85-100steps", "movement(sparsity=0.85), fit(steps=100)", []),
    ],
)
def test_names_that_hide_a_difference_are_found(row: str, steps: str, found: list[str]) -> None:
    assert find_unnamed(parse(steps, row)) == found


@pytest.mark.parametrize("key", registry.catalog())
def test_published_recipes_are_recipes_that_use_the_method(key: str) -> None:
    check_facts(registry.load(key)())


def test_a_method_of_a_paper_says_what_its_setting_is() -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(Weights):
        """For this test."""

        paper = "arXiv:0000.00000"

        def compress(self, layer: Any) -> Any: ...

    with pytest.raises(AssertionError, match="own setting is not named"):
        check_facts(Mine())
    Mine.published = "wanda()"
    with pytest.raises(AssertionError, match="does not use the method"):
        check_facts(Mine())
    Mine.published, Mine.caveats = "", ("half of it",)
    check_facts(Mine())
