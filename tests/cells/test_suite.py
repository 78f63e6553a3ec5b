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
    quick, full = mine.plan("quick"), mine.plan("full")
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
        ({"version": None}, "version"),
        ({"version": "two"}, "version: Value 'two'"),
        ({"version": 0}, "version: must be 1 or more"),
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
        ({"settings": {"window": "wide"}}, "window: Value 'wide'"),
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
    assert quant.plan("quick").seeds == (0,) and len(quant.plan("full").seeds) == 3


def test_choosing_rows():
    quant = suite.load("quant")
    chosen = quant.plan("quick", "gptq*, nf4")
    assert [recipe.name for recipe in chosen.recipes] == ["baseline", "gptq-4b", "gptq-3b", "gptq-2b", "nf4"]
    with pytest.raises(Usage, match="matches 'gtpq-4b'; did you mean 'gptq-4b'"):
        quant.plan("quick", "gtpq-4b")
    with pytest.raises(Usage, match="the full tier has it"):
        quant.plan("quick", "gptq-8b")


def test_seeds_count_where_they_matter():
    assert not suite.seeded(parse("rtn()"))
    assert not suite.seeded(parse("nf4(), rtn(bits=8)"))
    assert suite.seeded(parse("gptq()"))
    assert suite.seeded(parse("rtn(), fit(steps=2)"))


def test_a_recipe_from_the_command_line():
    adhoc = suite.adhoc("rtn(bits=8), nf4( )")
    assert (adhoc.name, adhoc.version) == ("adhoc", 1)
    assert [recipe.name for recipe in adhoc.recipes] == ["baseline", "rtn(bits=8), nf4()"]
    with pytest.raises(Usage, match="at least one step"):
        suite.adhoc(" ")
