"""Suites: every mistake shows before anything runs, with the file and the key."""

from __future__ import annotations

import pytest
import yaml

from effbench import probes
from effbench.cells import suite
from effbench.core.errors import Usage
from effbench.core.recipe import parse

GOOD = {
    "name": "mine",
    "version": 1,
    "description": "for tests",
    "recipes": [
        {"name": "rtn-{bits}b", "steps": "rtn(bits={bits})", "sweep": {"bits": [2, 4]}},
        {"name": "calibrated", "steps": "gptq(bits=3)"},
    ],
    "tiers": {"quick": {"recipes": ["rtn-*"]}, "full": {"seeds": [0, 1], "settings": {"limit": 7}}},
    "settings": {"window": 128},
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (GOOD | changes).items() if value is not None}))
        return str(path)

    return write


def test_a_suite_of_one_s_own(write):
    mine = suite.load(write())
    assert [recipe.name for recipe in mine.recipes] == ["baseline", "rtn-2b", "rtn-4b", "calibrated"]
    assert [str(recipe) for recipe in mine.recipes] == ["", "rtn(bits=2)", "rtn()", "gptq(bits=3)"]
    quick, full = mine.tier("quick"), mine.tier("full")
    assert [recipe.name for recipe in quick.recipes] == ["baseline", "rtn-2b", "rtn-4b"]
    assert (quick.seeds, full.seeds) == ((0,), (0, 1))
    assert quick.settings["window"] == full.settings["window"] == 128
    assert "limit" not in quick.settings and full.settings["limit"] == 7
    assert quick.settings["probes"] == list(probes.names())
    assert quick.models == ("tiny",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": []}, "recipe: unknown key; did you mean 'recipes'?"),
        ({"version": None}, "version: is missing"),
        ({"version": "two"}, "version='two': must be a whole number from 1 up, not str"),
        ({"version": 0}, "version=0: must be a whole number from 1 up"),
        ({"name": "other"}, "name: must be that of the file, 'mine'"),
        ({"recipes": [{"name": "a", "step": "rtn()"}]}, "step: unknown key; did you mean 'steps'"),
        ({"recipes": [{"name": "a"}]}, "steps"),
        ({"recipes": [{"name": "a", "steps": "rtm()"}]}, "recipes.a: unknown method 'rtm'; did you mean 'rtn'?"),
        ({"recipes": [{"name": "a", "steps": "rtn(bit=4)"}]}, "recipes.a: rtn(bit=4): no parameter 'bit'"),
        ({"recipes": [{"name": "a", "steps": "rtn(bits=5)"}]}, "recipes.a: rtn(bits=5): bits must be one of"),
        ({"recipes": [{"name": "a", "steps": "rtn(bits={bits})"}]}, "recipes.a: "),
        ({"recipes": [{"name": "a", "steps": "rtn()"}, {"name": "a", "steps": "nf4()"}]}, "two recipes are called 'a'"),
        ({"recipes": [{"name": "baseline", "steps": "rtn()"}]}, "two recipes are called 'baseline'"),
        ({"recipes": [{"name": "a", "steps": "rtn()"}, {"name": "b", "steps": "rtn(bits=4)"}]}, "have the same steps"),
        ({"recipes": [{"name": "a", "steps": ""}]}, "'baseline' and 'a' have the same steps"),
        ({"tiers": {"fast": {}}}, "tiers.fast: unknown tier; there is full, quick"),
        ({"tiers": {"quick": {"recipes": ["gptq*"]}}}, "tiers.quick.recipes: no row matches 'gptq*'"),
        ({"tiers": {"quick": {"seeds": []}}}, "tiers.quick.seeds: is empty"),
        ({"tiers": {"quick": {"seeds": ["x"]}}}, "seeds[0]"),
        ({"tiers": {"quick": {"models": []}}}, "tiers.quick.models: is empty"),
        ({"tiers": {"quick": {"models": ["shape:gpt3"]}}}, "tiers.quick.models: unknown shape 'gpt3'; did you mean"),
        ({"tiers": {"quick": {"models": ["nowhere"]}}}, "tiers.quick.models: model=nowhere: no such folder"),
        ({"settings": {"windows": 3}}, "windows: unknown key; did you mean 'window'?"),
        ({"settings": {"window": "wide"}}, "window='wide': must be a whole number from 2 up"),
        ({"settings": {"probes": ["spead"]}}, "unknown probe 'spead'; did you mean 'speed'?"),
    ],
)
def test_mistakes(write, changes, words):
    path = write(**changes)
    with pytest.raises(Usage) as error:
        suite.load(path)
    assert path in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "while parsing"),
        ("- a\n- b", "must hold keys"),
        ("!!python/object/apply:os.system ['true']", "python"),
    ],
)
def test_unreadable_files(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(Usage, match=words):
        suite.load(str(path))


def test_unknown_suites():
    with pytest.raises(Usage, match="unknown suite 'quan'; did you mean 'quant'"):
        suite.load("quan")
    with pytest.raises(Usage, match="unknown suite 'presets'"):
        suite.load("presets")


@pytest.mark.parametrize("name", suite.names())
def test_shipped_suites(name):
    shipped = suite.load(name)
    assert set(shipped.tiers) == {"quick", "full"}
    assert all(tier.recipes[0].name == "baseline" and tier.budget_minutes for tier in shipped.tiers.values())
    assert suite.header(name)["description"] == shipped.description


def test_quant_sweeps_the_family():
    quant = suite.load("quant")
    assert {step.key for recipe in quant.recipes for step in recipe.steps} == {
        "rtn", "gptq", "awq", "quip_sharp", "nf4", "squeezellm", "fp8_weight",
    }  # fmt: skip
    bits = {getattr(step, "bits", 4) for recipe in quant.recipes for step in recipe.steps}
    assert bits == {2, 3, 4, 8}
    assert quant.tier("quick").seeds == (0,) and len(quant.tier("full").seeds) == 3


def test_choosing_rows():
    quant = suite.load("quant")
    chosen = quant.tier("quick", "gptq*, nf4")
    assert [recipe.name for recipe in chosen.recipes] == ["baseline", "gptq-4b", "gptq-3b", "gptq-2b", "nf4"]
    with pytest.raises(Usage, match="matches 'gtpq-4b'; did you mean 'gptq-4b'"):
        quant.tier("quick", "gtpq-4b")
    with pytest.raises(Usage, match="the full tier has it"):
        quant.tier("quick", "gptq-8b")


def test_seeds_count_where_they_matter():
    assert not suite.seeded(parse("rtn()"))
    assert not suite.seeded(parse("nf4(), rtn(bits=8)"))
    assert suite.seeded(parse("gptq()"))
    assert suite.seeded(parse("rtn(), fit(steps=2)"))


def test_a_recipe_from_the_command_line():
    adhoc = suite.adhoc()
    assert (adhoc.name, adhoc.version) == ("adhoc", 1)
    tier = adhoc.tier("quick").with_row(adhoc.row("rtn(bits=8), nf4( )"))
    assert [recipe.name for recipe in tier.recipes] == ["baseline", "rtn(bits=8), nf4()"]
    with pytest.raises(Usage, match="at least one step"):
        adhoc.row(" ")


def test_a_recipe_joins_a_suite():
    quant = suite.load("quant")
    quick = quant.tier("quick", "rtn-4b")
    joined = quick.with_row(quant.row("rtn(bits=8), nf4( )"))
    assert [recipe.name for recipe in joined.recipes] == ["baseline", "rtn-4b", "rtn(bits=8), nf4()"]
    assert (joined.seeds, joined.settings) == (quick.seeds, quick.settings)


@pytest.mark.parametrize(("steps", "row"), [("rtn(bits=4)", "rtn-4b"), ("gptq(bits = 8)", "gptq-8b")])
def test_a_recipe_of_the_same_steps_is_the_row_itself(steps, row):
    """Whether the tier has it or only the suite."""
    quant = suite.load("quant")
    names = [recipe.name for recipe in quant.tier("quick").with_row(quant.row(steps)).recipes]
    assert names.count(row) == 1 and not any("(" in name for name in names)
