"""Recipes: ordered lists of methods, written as step strings such as `"nf4(), lora(rank=16), fit(steps=50)"`.

Parsing is strict: calls with literal keyword arguments and nothing else, never evaluated as code. A method that is
in no registry is written as its file and class, `./mine.py:Mine(x=1)`, with quotes around a path of spaces:
`'./my methods/mine.py:Mine'(x=1)`.

A preset is the name of several steps and is written like one: `qlora(rank=16)`. A parameter goes to the one step of the
preset that has a parameter of its name. Where several have it none of them is meant: the steps are to be written out.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from effbench.core import registry
from effbench.core.errors import Conflict, Usage
from effbench.core.method import Method
from effbench.core.run import conflict
from effbench.core.source import Parameter
from effbench.core.usage import convert, describe, nearest

# A quoted string, left as it is, or FILE.py:CLASS before its bracket.
REFERENCE = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|([^\s,'"()=]+\.py(?::\w+)?)(?=\s*\()""")

BARE = re.compile(r"""(?<![^\s,])[^\s,'"()=]+\.py(:\w+)?(?=\s*(?:,|$))""")  # one without its bracket
STEPS = "write steps as name(key=value), ..., with quotes round text"
SPELLED = {"true": True, "false": False, "none": None, "null": None}  # of Python, as others write them


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named, ordered list of methods; the recipe of no steps is the baseline."""

    name: str
    steps: tuple[Method, ...]
    grid: tuple[tuple[Method, ...], ...] = ()  # steps with other settings, of which the best is to be found

    def __str__(self) -> str:
        return ", ".join(map(str, self.steps))

    @property
    def label(self) -> str:
        """The steps as a person writes them."""
        return ", ".join(step.label for step in self.steps)

    def check(self) -> Recipe:
        """Raise `Conflict` where two steps write one slot, or put in what can be there once; each fit uses the train
        plan up."""
        writers: dict[str, str] = {}
        for step in self.steps:
            for slot in (*step.slots(), *step.fills):
                if slot in writers:
                    raise Conflict(conflict(slot, writers[slot], str(step)))
                writers[slot] = str(step)
            if step.consumes:
                writers = {slot: who for slot, who in writers.items() if not slot.startswith("train.")}
        return self

    def check_fits(self) -> Recipe:
        """Raise `Usage` for a step that acts through the fit behind it where none is, or that lacks what it builds on:
        either would change nothing."""
        last = max((place for place, step in enumerate(self.steps) if step.consumes), default=-1)
        idle = [step.label for step in self.steps[last + 1 :] if step.acts_in_fit]
        if idle:
            raise Usage(f"{idle[0]} acts through the fit that follows it, and none does: add fit() behind it")
        provided: set[str] = set()
        roles = {"reference", "model"}
        for step in self.steps:
            unknown = sorted(step.reads.keys() - roles)
            if unknown:
                raise Usage(
                    f"{step.label}: no step before it makes a model called {unknown[0]!r}: there is "
                    f"{', '.join(sorted(roles))}; snapshot(name={unknown[0]!r}) makes one"
                )
            if step.makes in roles:
                raise Usage(f"{step.label}: a model called {step.makes!r} is there already: give another name")
            roles |= {step.makes} - {""}
            if step.follows and step.follows not in provided:
                known = " or ".join(key for key in registry.catalog() if step.follows in registry.load(key).provides)
                raise Usage(f"{step.label} needs {step.follows} before it: put {known} in front")
            provided = set() if step.consumes else provided | step.provides
        return self

    def tuned(self, names: Sequence[str] | Mapping[str, Sequence[Any]]) -> Recipe:
        """The recipe with a grid over parameters, named such as `fit.lr`, with the values to try or, without any, those
        that the method says are worth it. The parameter is that of the last step of its name.

        Raises `Usage` for one that no step has, that cannot have such a value, or that its method names no values for.
        """
        if not names:
            return self
        if len(set(names)) < len(names):
            raise Usage("tune: a parameter is named twice")
        axes: list[tuple[int, str, tuple[Any, ...]]] = []
        for name in names:
            key, _, parameter = name.partition(".")
            place = max((i for i, step in enumerate(self.steps) if step.key == key), default=None)
            if place is None:
                raise Usage(f"tune: {name}: no step is called {key!r}{nearest(key, [step.key for step in self.steps])}")
            step = self.steps[place]
            if isinstance(names, Mapping):
                fields = [field.name for field in dataclasses.fields(step)]
                if parameter not in fields:
                    raise Usage(f"tune: {name}: {key} has no parameter {parameter!r}{nearest(parameter, fields)}")
                if not names[name]:
                    raise Usage(f"tune: {name}: is empty; name the values to try")
                axes.append((place, parameter, tuple(names[name])))
                continue
            if parameter not in step.tuned:
                known = ", ".join(f"{key}.{other}" for other in step.tuned) or "nothing"
                raise Usage(f"tune: {name}: {key} names values for {known}; others stand behind it, {name}: [VALUE]")
            axes.append((place, parameter, step.tuned[parameter]))
        points = [self.steps]  # the setting that the row has by itself
        for values in itertools.product(*(axis for _, _, axis in axes)):
            steps = list(self.steps)
            for (place, parameter, _), value in zip(axes, values, strict=True):
                steps[place] = dataclasses.replace(steps[place], **{parameter: value})
            if tuple(steps) not in points:
                points.append(tuple(steps))
        return dataclasses.replace(self, grid=tuple(points))

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return max((step.ranks for step in self.steps), default=1)

    @property
    def trained_part(self) -> Recipe:
        """The steps up to the last fit, which is all that ranks beside the first have a part in."""
        last = max((place for place, step in enumerate(self.steps) if step.consumes), default=-1)
        return dataclasses.replace(self, steps=self.steps[: last + 1])

    def resolved(self) -> list[dict[str, Any]]:
        """Every step with all its fields, for the record."""
        return [{"method": step.key, **dataclasses.asdict(step)} for step in self.steps]


def parse(text: str, name: str | None = None) -> Recipe:
    """The recipe of a step string; an empty string is the baseline. Raises `Usage`."""
    steps: list[Method] = []
    for call in _calls(text):
        preset = registry.presets().get(_name(call, text))
        if preset is not None:
            steps.extend(_fill(parse(preset).steps, call, preset))
        else:
            steps.append(_step(call, text))
    return Recipe(name if name is not None else (text.strip() or "baseline"), tuple(steps)).check()


def parse_step(text: str) -> Method:
    """The one method of a step string. Raises `Usage`."""
    calls = _calls(text)
    if len(calls) != 1:
        raise Usage(f"{text!r}: expected one step, found {len(calls)}")
    return _step(calls[0], text)


def preset_parameters(name: str) -> list[tuple[str, Parameter]]:
    """The parameters that a preset takes, each behind the key of the step it goes to; defaults are the preset's own.

    No method is imported. Raises `Usage` for a preset that cannot be read.
    """
    found = _list_parameters(registry.presets()[name])
    times = Counter(parameter.name for _, parameter in found)
    return [(step, parameter) for step, parameter in found if times[parameter.name] == 1]


def unique(recipes: Iterable[Recipe]) -> list[Recipe]:
    """The recipes, or `Usage` when two share a name."""
    by_name: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name in by_name:
            raise Usage(f"two recipes are called {recipe.name!r}: give one of them another name")
        by_name[recipe.name] = recipe
    return list(by_name.values())


def _calls(text: str) -> list[ast.Call]:
    if not text.strip():
        return []
    try:
        quoted = REFERENCE.sub(lambda match: match[1] or repr(match[2]), text)
        tree = ast.parse(f"({quoted}\n,)", mode="eval").body
        ast.unparse(tree)
        if not isinstance(tree, ast.Tuple):  # the text closes our bracket
            raise SyntaxError("unmatched ')'")
    except (RecursionError, MemoryError):
        raise Usage(f"recipe {text[:60]!r}... is nested too deeply") from None
    except (SyntaxError, ValueError) as error:
        if mend := _add_brackets(text):
            raise Usage(f"recipe {text!r} cannot be read: brackets are missing; {mend}") from None
        form = STEPS
        if ".py" in text:
            form += " or './my file.py:Class'(key=value), in quotes where the path has spaces"
        raise Usage(f"recipe {text!r} cannot be read: {error.args[0]}; {form}") from None
    for node in tree.elts:
        if not isinstance(node, ast.Call):
            raise Usage(f"recipe {text!r}: {ast.unparse(node)} is not a step; {_mend(node, text)}")
    return tree.elts  # type: ignore[return-value]


def _mend(node: ast.expr, text: str) -> str:
    """How to write what is no call: a method or a file with brackets; what has the name of none is told its nearest."""
    known = [*registry.catalog(), *registry.presets()]
    if isinstance(node, ast.Name) and node.id not in known:
        return f"no method has this name{nearest(node.id, known)}"
    if isinstance(node, ast.Name) or isinstance(getattr(node, "value", None), str):
        return f"write {ast.unparse(node)}()"
    return _add_brackets(text) or STEPS


def _add_brackets(text: str) -> str:
    """How the first file is written that lacks its class or brackets; empty where there is none."""
    bare = BARE.search(text)
    return "" if bare is None else f"write {bare[0]}{'' if bare[1] else ':CLASS'}()"


def _name(call: ast.Call, text: str) -> str:
    if isinstance(call.func, ast.Constant) and isinstance(call.func.value, str):
        return call.func.value
    if not isinstance(call.func, ast.Name):
        raise Usage(f"recipe {text!r}: {ast.unparse(call.func)!r} is not the name of a method")
    return call.func.id


def _list_parameters(text: str) -> list[tuple[str, Parameter]]:
    """The parameters of all steps with the keys of these; defaults are what the text gives."""
    found: list[tuple[str, Parameter]] = []
    for call in _calls(text):
        key = _name(call, text)
        if key in registry.presets():
            own = _list_parameters(registry.presets()[key])
        else:
            own = [(key, parameter) for parameter in registry.entry(key).parameters.values()]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        found += [(step, dataclasses.replace(p, default=given.get(p.name, p.default))) for step, p in own]
    return found


def _step(call: ast.Call, text: str) -> Method:
    key = _name(call, text)
    cls = registry.load(key)
    given = _read_arguments(call, [cls])
    with registry.blame_method(key):
        method = cls(**given)
        method.slots()  # asked for again when the recipe is checked
    return method


def _fill(steps: Sequence[Method], call: ast.Call, preset: str) -> list[Method]:
    """The steps of a preset with the arguments of its call."""
    fields = [_list_names(type(step)) for step in steps]
    changes: list[dict[str, Any]] = [{} for _ in steps]
    for name, value in _read_arguments(call, [type(step) for step in steps]).items():
        places = [place for place, own in enumerate(fields) if name in own]
        if len(places) > 1:
            several = " and ".join(f"{steps[place].key}.{name}" for place in places)
            raise Usage(f"{ast.unparse(call)}: {name} may be {several}: write the steps out, {preset}")
        changes[places[0]][name] = value
    filled = []
    for step, change in zip(steps, changes, strict=True):
        with registry.blame_method(step.key):
            filled.append(dataclasses.replace(step, **change))
    return filled


def _list_names(step: type[Method]) -> list[str]:
    """The names of the parameters of a step."""
    return [field.name for field in dataclasses.fields(step)]


def _read_arguments(call: ast.Call, steps: Sequence[type[Method]]) -> dict[str, Any]:
    """The arguments of a call, which have to be literals with names of parameters of these steps. Raises `Usage`."""
    shown = ast.unparse(call)
    names = _list_names(steps[0]) if len(steps) == 1 else sorted({name for step in steps for name in _list_names(step)})
    if call.args:
        raise Usage(f"{shown}: arguments must be named; the parameters are {', '.join(names) or 'none'}")
    given: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise Usage(f"{shown}: ** is not allowed")
        if keyword.arg in given:
            raise Usage(f"{shown}: {keyword.arg} is given twice")
        if keyword.arg not in names:
            raise Usage(f"{shown}: no parameter {keyword.arg!r}{nearest(keyword.arg, names)}")
        try:
            given[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            owner = next(step for step in steps if keyword.arg in _list_names(step))
            mend = _write(keyword.arg, keyword.value, typing.get_type_hints(owner)[keyword.arg])
            raise Usage(f"{shown}: {keyword.arg}={ast.unparse(keyword.value)} is not a literal; {mend}") from None
    return given


def _write(name: str, node: ast.expr, kind: Any) -> str:
    """How what is no literal is written as a value of this type, if quotes alone are missing; else what it may be."""
    for spelled in (SPELLED, {}):
        try:
            value = ast.literal_eval(ast.unparse(_Quoting(spelled).visit(ast.parse(ast.unparse(node), mode="eval"))))
            return f"write {name}={convert(value, kind, name)!r}"
        except (Usage, ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return f"it must be {describe(kind)}"


class _Quoting(ast.NodeTransformer):
    """Words become text, alone, with dots, slashes or dashes between and as a step, unless they are `spelled` so."""

    def __init__(self, spelled: Mapping[str, Any]) -> None:
        self.spelled = spelled

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.spelled.get(node.id.lower(), node.id))

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.Constant(ast.unparse(node))

    def visit_Call(self, node: ast.Call) -> ast.expr:
        return ast.Constant(ast.unparse(node))

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        return ast.Constant(ast.unparse(node).replace(" ", ""))
