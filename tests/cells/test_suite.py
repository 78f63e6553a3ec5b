"""Suites: every mistake shows before anything runs, with the file and the key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effbench import probes
from effbench.cells import suite
from effbench.cells.options import TIERS
from effbench.cli import main as cli
from effbench.core import plain_yaml
from effbench.core.errors import Usage
from effbench.core.paths import PACKAGE, SUITES
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
        ({"tiers": {"fast": {}}}, "tiers.fast: unknown tier; there is full, quick, real"),
        ({"tiers": {"quick": {"recipes": ["gptq*"]}}}, "tiers.quick.recipes: no row matches 'gptq*'"),
        ({"tiers": {"quick": {"seeds": []}}}, "tiers.quick.seeds: is empty"),
        ({"tiers": {"quick": {"seeds": ["x"]}}}, "seeds[0]"),
        ({"tiers": {"quick": {"models": []}}}, "tiers.quick.models: is empty"),
        ({"tiers": {"quick": {"models": ["shape:gpt3"]}}}, "tiers.quick.models: unknown shape 'gpt3'; did you mean"),
        ({"tiers": {"quick": {"models": ["nowhere"]}}}, "tiers.quick.models: model=nowhere: no such folder"),
        (
            {"tiers": {"real": {"data": "speech"}}},
            "tiers.real.data: data=speech: must be tiny, tiny:task, tiny:questions, tiny:planted, speeches",
        ),
        ({"tiers": {"real": {"data": "text:gone"}}}, "tiers.real.data: data=text:gone: no such folder"),
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
        ("!!python/object/apply:os.system ['true']", "tags"),
        ("name: a\nname: b", "name is given twice"),
        ("a: &a [*a]", "anchors"),
        ("name: \0", "unacceptable character"),
    ],
)
def test_unreadable_files(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(Usage, match=words):
        suite.load(str(path))


@pytest.mark.parametrize(
    ("text", "limit"), [("010", 10), ("0x10", None), ("1:30", None), ("1_000", None), ("1e3", None), ("yes", None)]
)
def test_numbers_are_read_as_written(write, text, limit):
    path = write()
    Path(path).write_text(Path(path).read_text().replace("limit: 7", f"limit: {text}"))
    if limit is None:
        with pytest.raises(Usage, match=f"settings of tier full: limit={plain_yaml.read(text)!r}: must be"):
            suite.load(path)
    else:
        assert suite.load(path).tier("full").settings["limit"] == limit


@pytest.mark.parametrize("name", ["../quant", "/etc/passwd", "quant/../quant", "*", "a" * 5000, "\0", "", ".", "~"])
def test_names_that_are_none(name):
    for written in (name, f"{name}.yaml"):
        with pytest.raises(Usage):
            suite.load(written)


@pytest.mark.parametrize("name", ["..", ".", "a b", "-", "a/b", "x" * 65])
def test_a_suite_s_name_can_be_that_of_a_folder(name, tmp_path):
    path = tmp_path / f"{name.replace('/', '_')}.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"name": name}))
    with pytest.raises(Usage, match="name: must be that of the file"):
        suite.load(str(path))


@pytest.mark.parametrize("name", [*suite.names(), "adhoc", "environments"])
def test_a_suite_of_one_s_own_has_a_name_of_its_own(name, tmp_path):
    """Else its records would lie among those of effbench's suite, and be compared with what is published of it."""
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"name": name}))
    with pytest.raises(Usage, match=f"effbench keeps records of its own as '{name}': rename the file"):
        suite.load(str(path))


def test_a_suite_of_effbench_may_be_named_by_its_file(monkeypatch):
    """By whatever way leads there: the folder is a link in a checkout."""
    monkeypatch.chdir(PACKAGE)
    for path in (SUITES / "quant.yaml", SUITES.resolve() / "quant.yaml", "suites/quant.yaml"):
        assert suite.load(str(path)) == suite.load("quant")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["${x}", "?", "*", "rtn()"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """Every place in a nested value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@st.composite
def damaged(draw):
    """A good suite in which something is something else."""
    body = json.loads(json.dumps(GOOD))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([place for place in places(body) if place]))
        inner = body
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict) and draw(st.booleans()):
            inner[draw(st.text(max_size=8) | st.sampled_from(["recipes", "steps", "limit", "probes"]))] = draw(ANYTHING)
        else:
            inner[last] = draw(ANYTHING)
    return json.dumps(body)


def load_or_usage(path, text):
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        suite.load(str(path))
    except Usage as error:
        assert str(error).startswith(str(path))


FUZZING = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZING
@given(damaged())
def test_any_object_is_a_suite_or_usage(tmp_path, text):
    load_or_usage(tmp_path / "mine.yaml", text)


@FUZZING
@given(st.data())
def test_any_text_is_a_suite_or_usage(tmp_path, data):
    text = (SUITES / "quant.yaml").read_text(encoding="utf-8")
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 40)))
    more = data.draw(st.text(max_size=12) | st.text(alphabet="[]{}&*!|>'\"%:-,. \n0123456789~<", max_size=8))
    load_or_usage(tmp_path / "quant.yaml", text[:begin] + more + text[end:])


def test_unknown_suites():
    with pytest.raises(Usage, match="unknown suite 'quan'; did you mean 'quant'"):
        suite.load("quan")
    with pytest.raises(Usage, match="unknown suite 'presets'"):
        suite.load("presets")


@pytest.mark.parametrize("name", suite.names())
def test_shipped_suites(name):
    shipped = suite.load(name)
    assert {"quick", "full"} <= set(shipped.tiers) <= set(TIERS)
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
    with pytest.raises(Usage, match="the quick and the full tier have it"):
        quant.tier("real", "rtn-8b")


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


def test_the_suite_in_the_documentation(tmp_path):
    text = (PACKAGE.parent / "docs" / "suites.md").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    mine = suite.load(str(tmp_path / "mine.yaml"))
    assert [recipe.name for recipe in mine.recipes] == ["baseline", "rtn-4b", "rtn-3b", "gptq-4b"]
    assert mine.tier("quick").settings["limit"] == 16 and mine.tier("full").seeds == (0, 1, 2)


def test_every_key_and_setting_is_documented(capsys):
    """By the comment beside its field, which `effbench run --help` shows."""
    assert cli.main(["run", "--help"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    texts = {words[0]: words[1] for words in lines if len(words) == 2}
    for kind, mark in ((suite.Settings, "="), (suite.SuiteFile, ":"), (suite.Template, ":"), (suite.Stage, ":")):
        for field in dataclasses.fields(kind):
            assert texts[field.name + mark].strip()


def test_a_row_is_tuned_over_what_its_methods_name_or_the_suite():
    row = parse("fit(steps=9, lr=0.5), student(), kd(), fit(steps=8)")
    grid = row.tuned(["kd.alpha", "kd.temperature"]).grid
    assert [(steps[2].alpha, steps[2].temperature) for steps in grid] == [
        (0.5, 2.0), (0.5, 1.0), (0.9, 1.0), (0.9, 2.0)
    ]  # its own first  # fmt: skip
    named = row.tuned({"fit.lr": [0.1, 0.2], "kd.alpha": [0.5]}).grid
    assert [(steps[0].lr, steps[3].lr, steps[2].alpha) for steps in named] == [
        (0.5, 1e-4, 0.5), (0.5, 0.1, 0.5), (0.5, 0.2, 0.5)
    ]  # of two fits the last  # fmt: skip


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ("[fit.schedule]", "tune: fit.schedule: fit names values for fit.lr; others stand behind it"),
        ("[fti.lr]", "no step is called 'fti'; did you mean 'fit'"),
        ("[fit.lr, fit.lr]", "named twice"),
        ("{fit.lrr: [1]}", "fit has no parameter 'lrr'; did you mean 'lr'"),
        ("{fit.lr: []}", "fit.lr: is empty"),
        ("{fit.lr: [high]}", "fit.lr='high': must be"),
        ("{fit.lr: 0.1}", "fit.lr"),
        ("3", "tune"),
    ],
)
def test_slips_in_what_a_row_is_tuned_over(tmp_path, tune, message):
    body = f"name: mine\nversion: 1\ndescription: d\nrecipes: [{{name: a, steps: 'fit(steps=2)', tune: {tune}}}]\n"
    (tmp_path / "mine.yaml").write_text(f"{body}tiers: {{quick: {{}}}}\n")
    with pytest.raises(Usage, match="recipes") as error:
        suite.load(str(tmp_path / "mine.yaml"))
    assert message in str(error.value)
