"""A class that is no complete method is found before anything runs, and what is read from source is what is there."""

from __future__ import annotations

import dataclasses
import enum
import typing
from pathlib import Path
from typing import Any

import pytest

from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.kinds import KINDS, Cache, Evict, Prompt, Select, Swap, Train, Weights
from effbench.core.method import Method
from effbench.core.source import document_fields


def define(base, **names):
    """A frozen dataclass of a kind with the given names in it."""
    return dataclasses.dataclass(frozen=True)(type("Toy", (base,), {"__module__": __name__, **names}))


def give(self, *_):
    return None


@pytest.mark.parametrize(
    ("base", "names", "missing"),
    [
        (Weights, (), r"does not define compress\(layer\) or compress_block\(block, shared\)$"),
        (Weights, ("compres",), r"compress\(layer\).*; it has 'compres': did you mean 'compress'\?"),
        (Weights, ("loss",), r"compress\(layer\)"),
        (Swap, ("settle",), r"replace\(module, site\)"),
        (Select, (), r"score\(examples, run\) or order\(examples, run\)"),
        (Train, ("slots",), r"batch\(batch, run\) or .* or slot_values\(\) or claims"),
        (Cache, (), r"score\(slots, state\) and capacity\(prompt\) or codecs\(\) or reach"),
        (Cache, ("score",), r"does not define capacity\(prompt\)$"),
        (Cache, ("capacity", "codecs"), r"does not define score\(slots, state\)$"),
        (Cache, ("scores",), r"reach; it has 'scores': did you mean 'score'\?"),
        (Evict, ("capacity",), r"does not define score\(slots, state\)$"),
        (Prompt, ("rewrites",), r"rewrite\(segments, run\); it has 'rewrites': did you mean 'rewrite'\?"),
        (Method, ("check",), r"apply\(run\) or batch\(batch, run\)"),
    ],
)
def test_a_missing_override_is_named(base, names, missing):
    with pytest.raises(Usage, match=rf"^Toy in .*test_definition\.py .*{missing}"):
        define(base, **dict.fromkeys(names, give))()


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (Weights, ("compress",)),
        (Weights, ("compress_block",)),
        (Swap, ("replace",)),
        (Select, ("score",)),
        (Select, ("order",)),
        (Train, ("on_step",)),
        (Train, ("slot_values",)),
        (Cache, ("score", "capacity")),
        (Cache, ("codecs",)),
        (Cache, ("reach",)),
        (Cache, ("score", "capacity", "codecs", "reach")),
        (Evict, ("score",)),
        (Prompt, ("rewrite",)),
        (Method, ("apply",)),
        (Method, ("loss",)),
    ],
)
def test_what_is_enough(base, names):
    assert define(base, **dict.fromkeys(names, give))()


def test_a_variant_inherits_what_its_method_defines():
    assert define(define(Weights, compress=give))()


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_kind_itself_is_no_method(kind):
    with pytest.raises(Usage, match="does not define"):
        kind()


def test_a_base_of_a_family_says_what_its_methods_define():
    from effbench.methods.prune._saliency import Patterned, Saliency

    with pytest.raises(Usage, match=r"Toy in .* does not define score\(layer\); it has 'scores'"):
        define(Patterned, scores=give)()
    with pytest.raises(Usage, match=r"does not define zeros$"):
        define(Saliency, score=give)()


def test_a_class_typed_at_a_prompt_is_understood():
    method = type("Toy", (Weights,), {"__module__": "nowhere", "compress": give})
    with pytest.raises(Usage, match=r"^Toy in nowhere: write @dataclass"):
        method()
    assert document_fields(dataclasses.dataclass(frozen=True)(method)) == {}


def test_a_class_without_its_decorator_says_so():
    with pytest.raises(Usage, match=r"^Bare in .*: write @dataclass\(frozen=True\) above the class$"):
        type("Bare", (Weights,), {"__module__": __name__, "compress": give, "bits": 4})(bits=2)


# ---- values of parameters ----


def with_parameter(kind, **default):
    """A method with one parameter `x` of a type."""
    return define(Weights, __annotations__={"x": kind}, x=dataclasses.field(**default), compress=give)


Colour = enum.StrEnum("Colour", "RED")


@pytest.mark.parametrize(
    "kind",
    [
        object,
        Any,
        bytes,
        Path,
        Colour,
        tuple,
        typing.Dict,  # noqa: UP006
        set[int],
        dict[int, str],
        dict[str, list[Any]],
        tuple[int, ...] | bytes,
        typing.Literal["a", b"b"],
        [int],
    ],
)
def test_a_type_of_values_that_no_recipe_can_write_is_refused(kind):
    words = r"^Toy in .*test_definition\.py: x: .* is no type of a parameter; it may be bool, int, .*of these$"
    with pytest.raises(Usage, match=words):
        with_parameter(kind, default=None)()


def test_text_that_is_not_written_as_text_is_refused():
    with pytest.raises(Usage, match=r"\.x=.*: must be plain text, not Colour$"):
        with_parameter(tuple[str, ...], default=(Colour.RED,))()


@pytest.mark.parametrize(
    ("kind", "value", "other"),
    [
        (tuple[int, ...], (1, 2), (2,)),
        (tuple[float, ...], [1, 2], (1.5,)),
        (list[int], [], [1]),
        (dict[str, list[int]], {"a": [1]}, {}),
        (str, "a", "b"),
        (float, 1, 2.0),
        (int | None, None, 3),
        (typing.Literal["a"] | None, None, "a"),
    ],
)
def test_a_default_that_is_made_is_no_change(kind, value, other):
    method = with_parameter(kind, default_factory=lambda: value)
    assert str(method()).endswith("()") and str(method(x=value)).endswith("()")
    assert str(method(x=other)).endswith(f"(x={other!r})")


# ---- read from source ----

HEAD = '"""Toy: for tests."""\nfrom dataclasses import dataclass\n'
BODY = "@dataclass(frozen=True)\nclass Toy({base}):\n    def compress(self, layer): pass\n"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The registry's entry of the source of a toy."""

    def write(text, **shared):
        family = tmp_path / "root" / "mine"
        family.mkdir(parents=True, exist_ok=True)
        for name, content in {"toy": text, **shared}.items():
            (family / f"{name}.py").write_text(content)
        monkeypatch.setenv("EFFBENCH_METHODS", str(family.parent))
        registry._catalog.cache_clear()
        return registry.catalog()["toy"]

    yield write
    registry._catalog.cache_clear()


@pytest.mark.parametrize(
    ("imports", "base"),
    [
        ("from effbench.core.kinds import Weights", "Weights"),
        ("from effbench.core.kinds import Weights as W", "W"),
        ("from effbench.core import kinds", "kinds.Weights"),
        ("from effbench.core import kinds as k", "k.Weights"),
        ("import effbench.core.kinds", "effbench.core.kinds.Weights"),
        ("import effbench.core.kinds as k", "k.Weights"),
        ("from ._shared import Base", "Base"),
        ("from . import _shared", "_shared.Base"),
        ("from ._shared import Weights", "Weights"),  # by way of another file
        ("from effbench.methods.prune.magnitude import Magnitude", "Magnitude"),
        ("from effbench.methods.prune.wanda import Wanda as Toy", "Toy"),  # the base has the name of the class
        ("if True:\n    from effbench.core.kinds import Weights", "Weights"),
    ],
)
def test_the_kind_is_found_however_the_base_is_written(imports, base, read):
    shared = "from effbench.core.kinds import Weights\nclass Base(Weights):\n    inherited: int = 1  # from above\n"
    entry = read(f"{HEAD}{imports}\n{BODY.format(base=base)}", _shared=shared)
    assert entry.kind == "Weights"
    if base.endswith("Base"):
        assert entry.parameters["inherited"].comment == "from above"
    assert registry.load("toy").__name__ == "Toy"


def test_bases_that_lead_nowhere_are_no_trouble(read):
    toy = f"{HEAD}from ._shared import Base\n{BODY.format(base='Base')}"
    entry = read(toy, _shared="from ._other import Base\n", _other="from ._shared import Base\n")
    assert entry.kind == "apply"
    assert read(f"{HEAD}from ....x import Base\n{BODY.format(base='Base')}").kind == "apply"
    assert read(f"{HEAD}{BODY.format(base='make()')}").kind == "apply"


def test_a_base_in_a_file_that_cannot_be_read_breaks_the_method(read):
    assert read(f"{HEAD}from ._shared import Base\n{BODY.format(base='Base')}", _shared="class (").kind == "broken"


FIELDS = '''"""Toy: for tests."""
from dataclasses import dataclass, field
from typing import ClassVar, Literal
from effbench.core.kinds import Weights
from ._shared import Grid

Way = Literal["up", "down"]

@dataclass(frozen=True)
class Toy(Weights):
    """A toy."""

    no_field: ClassVar[int] = 1  # of the class
    bits: int = 4  # of a weight # and more
    # Said above,
    # on two lines.
    above: float = 0.5
    bare: bool = False
    text: str = "# no comment"
    made: tuple[int, ...] = field(default=(1, 2))  # by field
    long: tuple[int, ...] = field(
        default_factory=lambda: (3,),
    )  # at its end
    way: Way = "up"  # of two
    grid: Grid = "a"  # from elsewhere
    must: int = field()  # no default
    on: float = 1.0  # begins beside it
    # and goes on below
    near: int = 2  # beside
    # This is said of the next one.
    following: int = 3
    last: int = 4  # of all,
    # on two lines

    def compress(self, layer): pass
'''


def test_comments_beside_fields_are_their_documentation(read):
    entry = read(FIELDS, _shared="from typing import Literal\nGrid = Literal['a', 'b']\n")
    read_as = {name: (parameter.default, parameter.comment) for name, parameter in entry.parameters.items()}
    assert read_as == {
        "bits": ("4", "of a weight # and more"),
        "above": ("0.5", "Said above, on two lines."),
        "bare": ("False", ""),
        "text": ("'# no comment'", ""),
        "made": ("(1, 2)", "by field"),
        "long": ("(3,)", "at its end"),
        "way": ("'up'", "of two"),
        "grid": ("'a'", "from elsewhere"),
        "must": (None, "no default"),
        "on": ("1.0", "begins beside it and goes on below"),
        "near": ("2", "beside"),
        "following": ("3", "This is said of the next one."),
        "last": ("4", "of all, on two lines"),
    }
    assert entry.parameters["way"].type == "Literal['up', 'down']"
    assert entry.parameters["grid"].type == "Literal['a', 'b']"
    assert str(entry.parameters["bits"]) == "bits: int = 4"


NAMED = '''"""Toy: for tests."""
from dataclasses import dataclass, field
from effbench.core.kinds import Weights
from ._shared import THERE, OTHER as ALIAS

HERE = "target"
TYPED: int = 8
LOOP = LOOP

@dataclass(frozen=True)
class Toy(Weights):
    value: object = '''


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("HERE", "'target'"),
        ("TYPED", "8"),
        ("THERE", "0.1"),
        ("ALIAS", "'target'"),
        ("2.0 ** 24", "16777216.0"),
        ("100 / 3", "33.333333333333336"),
        ("2 * TYPED + 1", "17"),
        ("-THERE", "-0.1"),
        ("not False", "True"),
        ("(HERE, 1 / 4)", "('target', 0.25)"),
        ("[1_000, 1e-6]", "[1000, 1e-06]"),
        ("field(default=TYPED // 3)", "2"),
        ("field(default_factory=lambda: (HERE,))", "('target',)"),
        # What no recipe can say stays as it is written.
        ("made()", "made()"),
        ("UNKNOWN", "UNKNOWN"),
        ("LOOP", "LOOP"),
        ("1 / 0", "1 / 0"),
        ("HERE + 1", "HERE + 1"),
        ("1e999", "1e309"),
        ("1e999 - 1", "1e309 - 1"),
    ],
)
def test_a_default_is_shown_as_a_recipe_has_it(read, written, shown):
    entry = read(f"{NAMED}{written}  # of it\n", _shared="THERE = 1 / 10\nOTHER = 'target'\n")
    assert entry.parameters["value"].default == shown


@dataclasses.dataclass
class Above:
    """Options of an ancestor."""

    first: int = 1  # of all


@dataclasses.dataclass
class Options(Above):
    """Options."""

    folder: list[str] = dataclasses.field(default_factory=list)  # where to
    # over the line
    seeds: str | None = None


def test_options_are_documented_by_the_same_comments():
    from effbench.cli.command import document_options

    assert document_fields(Options)["folder"].default == "list()"
    assert document_options(Options).splitlines() == [
        "options:",
        "  first=  of all [1]",
        "  folder= where to [list()]",
        "  seeds=  over the line",
    ]
