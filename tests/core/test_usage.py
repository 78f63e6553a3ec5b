"""What users write, on the command line and in YAML: read as written, or one line of `Usage`."""

from __future__ import annotations

import dataclasses
import keyword
import math
import string
import typing
from typing import Annotated, Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import Meta

from effbench.cells.export import ExportOptions
from effbench.cells.options import RunOptions
from effbench.cells.suite import Settings
from effbench.core import plain_yaml, registry
from effbench.core.errors import Usage
from effbench.core.recipe import parse as parse_recipe
from effbench.core.usage import Count, convert, describe, nearest, parse, typed
from effbench.core.usage import given as read_options

# ---- plain YAML ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10),
        ("010", 10),  # not octal
        ("-3", -3),
        ("+3", 3),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("[0, 1]", [0, 1]),
        ("{a: [1, b]}", {"a": [1, "b"]}),
        ("'10'", "10"),
        *((text, text) for text in ("0x10", "0o10", "1_000", "1:30", "yes", "no", "on", "off", ".nan", ".inf", "=")),
        ("2020-01-01", "2020-01-01"),
        ("${x}", "${x}"),
        ("<<: 1", {"<<": 1}),
        ("1: 2", {1: 2}),
    ],
)
def test_values_are_read_as_written(text, value):
    read = plain_yaml.read(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[0", "line 1, column 3"),
        ("{a: 1, a: 2}", "line 1, column 8: a is given twice"),
        ("&a [*a]", "line 1: anchors"),
        ("a: &b 1\nc: *b", "line 1: anchors"),
        ("!!python/object/apply:os.system ['true']", "line 1: tags"),
        ("!!int 3", "line 1: tags"),
        ("? [a]\n: 1", "a key must be a word"),
        ("1\n---\n2", "a single document"),
        ("9" * 5000, "too long"),
        ("[" * 5000, "nested too deeply"),
        ("a\0b", "unacceptable character"),
    ],
)
def test_more_than_plain_yaml_is_refused(text, words):
    with pytest.raises(Usage, match=words) as error:
        plain_yaml.read(text)
    assert "\n" not in str(error.value)


@given(st.text() | st.text(alphabet="[]{}&*!|>'\"%@`#:-?,. \n\t0123456789ae_x~<=+"))
def test_any_text_is_read_or_refused(text):
    with_usage_only(plain_yaml.read, text)


# ---- types ----


@dataclasses.dataclass
class Inner:
    count: Count = 1
    ratio: float = 0.5


@dataclasses.dataclass
class Outer:
    name: str
    inner: Inner = dataclasses.field(default_factory=Inner)
    many: dict[str, list[Inner]] = dataclasses.field(default_factory=dict)
    mode: Literal["fast", "slow"] | None = None
    pairs: list[Annotated[list[int], Meta(min_length=2, max_length=2)]] = dataclasses.field(default_factory=list)
    free: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_nested_values():
    given = {"name": "a", "inner": {"count": 2}, "many": {"x": [{"ratio": 1}]}, "mode": "slow", "pairs": [[1, 2]]}
    outer = typed(Outer, given)
    assert outer == Outer("a", Inner(2), {"x": [Inner(1, 1.0)]}, "slow", [[1, 2]])
    assert type(outer.many["x"][0].ratio) is float


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nam": 1}, "nam: unknown key; did you mean 'name'?"),
        ({"inner": {"cuont": 1}}, "inner.cuont: unknown key; did you mean 'count'?"),
        ({"inner": {"count": 0}}, "inner.count=0: must be a whole number from 1 up, not int"),
        ({"inner": {"count": True}}, "inner.count=True: must be a whole number from 1 up, not bool"),
        ({"inner": {"count": 2.0}}, "inner.count=2.0: must be a whole number"),
        ({"inner": {"count": "2"}}, "inner.count='2': must be a whole number"),
        ({"inner": [1]}, "inner=[1]: must be keys with values, not list"),
        ({"inner": None}, "inner=None: must be keys with values"),
        ({"inner": {"ratio": math.nan}}, "inner.ratio=nan: must be a finite number"),
        ({"inner": {"ratio": math.inf}}, "inner.ratio=inf: must be a finite number"),
        ({"inner": {"ratio": 10**400}}, "inner.ratio="),
        ({"many": {"x": [{}, {"ratio": "a"}]}}, "many.x[1].ratio='a': must be a number, not str"),
        ({"many": {1: []}}, "many: key =1: must be text"),
        ({"mode": "medium"}, "mode='medium': must be one of 'fast', 'slow'"),
        ({"pairs": [[1, 2, 3]]}, "pairs[0]"),
        ({"pairs": [1]}, "pairs[0]=1: must be a list in brackets"),
        ({"free": {"a": [math.inf]}}, "free.a"),
        ({"free": {"a": {"b": "\ud800"}}}, "free.a"),
        ({"name": "a\0"}, "holds characters that are not text"),
        ({"name": ["a" * 10_000]}, "name=['aaa"),
    ],
)
def test_wrong_values(changes, words):
    with pytest.raises(Usage) as error:
        typed(Outer, {"name": "a"} | changes)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_missing_value():
    with pytest.raises(Usage, match=r"^name: is missing$"):
        typed(Outer, {})
    with pytest.raises(Usage, match="must hold keys such as name, inner"):
        typed(Outer, [1])


@pytest.mark.parametrize(
    ("value", "kind", "converted"),
    [
        (3, float, 3.0),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((1, 2), tuple[float, float], (1.0, 2.0)),
        (["a"], Literal["all"] | tuple[str, ...], ("a",)),
        ("all", Literal["all"] | tuple[str, ...], "all"),
        (None, int | None, None),
    ],
)
def test_literals_of_recipes(value, kind, converted):
    result = convert(value, kind, "it")
    assert result == converted and type(result) is type(converted)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or None"),
        (Literal["all"] | tuple[str, ...], "'all' or a tuple of text"),
        (tuple[float, float], "a tuple of a number, a number"),
        (list[Count], "a list in brackets, each item a whole number from 1 up"),
    ],
)
def test_types_in_words(kind, words):
    assert describe(kind) == words


# ---- fuzzing ----


def with_usage_only(function: Any, *arguments: Any) -> Any:
    """What `function` returns; nothing but `Usage`, of something to read, may come out of it."""
    try:
        return function(*arguments)
    except Usage as error:
        assert str(error).strip()
        return None


NAMES = sorted({field.name for kind in (RunOptions, ExportOptions, Settings) for field in dataclasses.fields(kind)})
VALUES = st.one_of(
    st.text(),
    st.text(alphabet="[]{}${}&*!?|>'\"%:-,. 0123456789ae_x~<"),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=8).map(repr),
    st.sampled_from(["{}", "${x}", "?", "? a", "[[0]]", "{a: {b: [1]}}", "010", "1:30", "\0", "9" * 400, "\ud800"]),
)
ARGUMENTS = st.lists(
    st.builds("{}={}".format, st.sampled_from(NAMES) | st.text(max_size=8), VALUES) | st.text(max_size=12), max_size=4
)


@settings(max_examples=400, deadline=None)  # the first example may import methods
@given(ARGUMENTS)
@example(["seeds={}"])
@example(["jobs=${x}"])
@example(["? a=1"])
@example(["seeds=[[[0]]]"])
def test_any_arguments_are_options_or_usage(arguments):
    options = with_usage_only(parse, RunOptions, arguments)
    if options is not None:
        with_usage_only(options.check)
        assert options.limit is None or (type(options.limit) is int and options.limit > 0)
        assert math.isfinite(options.timeout) and options.timeout > 0
    with_usage_only(parse, ExportOptions, arguments)
    with_usage_only(read_options, Settings, arguments)


STEPS = st.one_of(
    st.text(),
    st.text(alphabet=string.ascii_lowercase + "()[]{}=,.'\"*#:\\\n\0 0123456789_"),
    st.builds(
        "{}({}={!r})".format,
        st.sampled_from(["rtn", "gptq", "lora", "fit", "nf4", "magnitude", "rtm"]),
        st.sampled_from(["bits", "sparsity", "targets", "rank", "steps", "x"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(), st.lists),
    ),
    st.sampled_from(["(" * 300, "rtn(bits=" + "-" * 3000 + "1)", "rtn(bits=1e999)", "rtn(bits=" + "9" * 5000 + ")"]),
)


@settings(max_examples=400, deadline=None)  # the first example may import methods
@given(STEPS)
def test_any_steps_are_a_recipe_or_usage(steps):
    recipe = with_usage_only(parse_recipe, steps)
    if recipe is not None:
        assert parse_recipe(str(recipe)).steps == recipe.steps


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**20, 10**300])
def test_whole_numbers_of_over_64_bits_are_refused_wherever_they_stand(number):
    @dataclasses.dataclass
    class Holds:
        count: int | None = None
        pairs: list[list[int]] | None = None
        anything: Any = None

    for text in (f"count={number}", f"anything={number}"):
        with pytest.raises(Usage, match="must be at most 9223372036854775807 in magnitude"):
            read_options(Holds, [text])
    for values in ({"count": number}, {"pairs": [[1, number]]}, {"anything": {"deep": [number]}}):
        with pytest.raises(Usage, match=r"(count|pairs|anything).*must be"):
            typed(Holds, values)
    assert read_options(Holds, [f"count={2**63 - 1}"]) == {"count": 2**63 - 1}


def test_choices_are_listed_where_they_can_be_read():
    many = [*map(str, range(10_000)), "facts"]
    assert nearest("pear", ["apple", "fig"]) == "; there is apple, fig"
    assert nearest("pear", many) == "; none of 10001 has a name like it"
    assert nearest("fcts", many) == "; did you mean 'facts'?"
    assert nearest("pear", []) == "; there is none"


@pytest.mark.parametrize("key", registry.catalog())
def test_what_lacks_its_quotes_is_told_how_it_is_written(key: str) -> None:
    """Each choice of each parameter; what is then written has the meaning."""
    cls = registry.load(key)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        for choice in typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is Literal else ():
            if not isinstance(choice, str):
                continue
            word = choice.isidentifier() and not keyword.iskeyword(choice)
            written = f"is not a literal; write {field.name}={choice!r}$"
            told = written if word else f"{written}|with quotes round text"  # what Python cannot read
            with pytest.raises(Usage, match=told):
                parse_recipe(f"{key}({field.name}={choice})")
            if not word:
                continue
            with pytest.raises(Usage, match="is not a literal; it must be one of .*'" + choice):
                parse_recipe(f"{key}({field.name}={choice}x)")


@pytest.mark.parametrize(
    ("step", "written"),
    [
        ("lora(targets=(q_proj, v_proj))", "targets=('q_proj', 'v_proj')"),
        ("nf4(double_quant=true)", "double_quant=True"),
        ("fit(clip=none)", "clip=None"),
        ("kd(teacher=reference)", "teacher='reference'"),
        ("snapshot(model=someone/model)", "model='someone/model'"),
        ("active_learning(acquire=bald(samples=10))", "acquire='bald(samples=10)'"),
        ("qlora(targets=all)", "targets='all'"),
    ],
)
def test_words_are_told_as_the_literal_that_they_stand_for(step: str, written: str) -> None:
    with pytest.raises(Usage) as refused:
        parse_recipe(step)
    assert str(refused.value).endswith(f"is not a literal; write {written}")
    name = written.partition("=")[0]
    assert parse_recipe(step.replace(step[step.index(name) : -1], written))


@pytest.mark.parametrize("step", ["fit(steps=a.b)", "fit(lr=1/1000)", "fp16(cap=2**24)", "rtn(bits=open('x'))"])
def test_what_no_quotes_mend_is_told_what_it_must_be(step: str) -> None:
    with pytest.raises(Usage, match=r"is not a literal; it must be a (whole )?number"):
        parse_recipe(step)


def test_text_that_is_no_word_is_told_of_quotes() -> None:
    with pytest.raises(Usage, match="with quotes round text"):
        parse_recipe("pp(schedule=1f1b)")
