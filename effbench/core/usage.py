"""Checks of what a user wrote, on the command line and in files: a mistake is `Usage`, one line with the mend."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import math
import operator
import reprlib
import tempfile
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import msgspec

from effbench.core import plain_yaml
from effbench.core.errors import Usage

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]  # what generators of random numbers take

LARGEST = 2**63 - 1  # whole number that records and tensors hold
TOO_LARGE = f"must be at most {LARGEST} in magnitude"
LONGEST = 200  # characters of a name that is compared with others
LISTED = 200  # names that a message lists
SOME = 5  # of many names, in one message


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x' or 'y'?` for the nearest choices, or the list of them where it is not too long to read."""
    choices = list(choices)
    close = difflib.get_close_matches(name[:LONGEST], choices, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    if len(choices) > LISTED:
        return f"; none of {len(choices)} has a name like it"
    return f"; there is {', '.join(sorted(choices)) or 'none'}"


def one_of(name: str, value: str | None, choices: Iterable[str]) -> None:
    """Raise `Usage` unless `value` is None or one of `choices`."""
    if value is not None and value not in (choices := list(choices)):
        raise Usage(f"unknown {name} {value!r}{nearest(value, choices)}")


def named_path(name: str, value: str) -> Path:
    """The file or folder that an option names, `~` resolved. Raises `Usage` for a name that no file can have."""
    try:
        path = Path(value).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        shown = value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
        raise Usage(f"{name}={shown}: {getattr(error, 'strerror', None) or error}") from None
    return path


def check_writable(name: str, path: Path) -> None:
    """Raise `Usage` unless a file or folder can be made at `path`; makes nothing."""
    nearest = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise Usage(f"{name}={path}: cannot write there ({error.strerror}); choose another folder") from None


def parse(kind: type[T], arguments: Iterable[str]) -> T:
    """The options that `key=value` arguments give, as the dataclass `kind`. Raises `Usage`."""
    return kind(**given(kind, arguments))


def given(kind: type, arguments: Iterable[str], what: str = "option") -> dict[str, Any]:
    """The fields of the dataclass `kind` that `key=value` arguments give, of its types. Raises `Usage`.

    Values are plain YAML (`effbench.core.plain_yaml`), but text is taken as typed.
    """
    hints = _hints(kind)
    values: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name in hints and not text:
            raise Usage(f"{argument!r}: write {name}=VALUE, or leave the {what} out")
        if not equals:
            raise Usage(f"unexpected {argument!r}: {what}s are written key=value")
        if name not in hints:
            raise Usage(f"unknown {what} {name!r}{nearest(name, hints)}")
        if name in values:
            raise Usage(f"{what} {name} is given twice")
        stripped = _without_none(hints[name])
        value: Any = None
        try:
            value = text if stripped is str else plain_yaml.read(text)
            values[name] = convert(value, hints[name], name)
        except Usage:
            large = isinstance(value, int) and abs(value) > LARGEST
            raise Usage(f"{name}={text}: {TOO_LARGE if large else f'must be {describe(stripped)}'}") from None
    return values


def convert(value: Any, kind: Any, where: str) -> Any:
    """`value`, which may be nested and as YAML or Python literals give it, as the type `kind`.

    Lists become tuples and whole numbers become floats where `kind` says so; nothing else is changed. `kind` may hold
    dataclasses, whose fields are the keys of a mapping. Raises `Usage` that begins with `where`.
    """
    origin, arms = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _fields(value, cast(type, kind), where)
    if origin is dict and isinstance(value, Mapping):
        for key in value:
            convert(key, arms[0], f"{where}: key ")
        return {key: convert(item, arms[1], f"{where}.{key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [convert(item, arms[0], f"{where}[{index}]") for index, item in enumerate(value)]
    try:
        converted = msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, UnicodeEncodeError):  # the last for halves of characters
        wrong = type(value).__name__
        shown = f"{where}={_SHORT.repr(value)}"
        raise Usage(f"{shown}: must be {describe(kind)}, not {wrong}") from None
    except RecursionError:
        raise Usage(f"{where}: is nested too deeply") from None
    _check_plain(converted, where)
    return converted


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is one of the patterns, in which `*` and `?` stand for any characters."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def list_some(names: Sequence[str]) -> str:
    """The names between commas, of many the first few and how many more there are."""
    more = f" and {len(names) - SOME} more" if len(names) > SOME else ""
    return f"{', '.join(names[:SOME])}{more}"


def typed(kind: type[T], values: Any) -> T:
    """An instance of a dataclass from a mapping of plain, maybe nested values. Raises `Usage` that begins with the
    key."""
    if not isinstance(values, Mapping):
        keys = ", ".join(field.name for field in dataclasses.fields(cast(Any, kind)))
        raise Usage(f"must hold keys such as {keys}")
    return cast(T, _fields(values, kind, ""))


def is_plain(kind: Any) -> bool:
    """Whether all values of a type can be written in a recipe and in a record, and are read back as they were."""
    origin, arms = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return is_plain(arms[0])
    if origin is dict:
        return arms[:1] == (str,) and is_plain(arms[1])
    if origin in (Union, types.UnionType, list, tuple):
        return bool(arms) and all(is_plain(arm) for arm in arms if arm is not Ellipsis)
    if origin is Literal:
        return all(is_plain(type(arm)) for arm in arms)
    return kind is not Any and kind in list(_WORDS)  # a list: what is no type may have no hash


def describe(kind: Any) -> str:
    """The values of a type, in words."""
    origin, arms = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(arms[0]) + "".join(map(_bounds, arms[1:]))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arms))
    if origin is Literal:
        return f"one of {', '.join(map(repr, arms))}" if len(arms) > 1 else repr(arms[0])
    if origin is list:
        return f"a list in brackets, each item {describe(arms[0])}"
    if origin is tuple:
        items = (arms[0],) if arms[1:] == (Ellipsis,) else arms
        return f"a tuple of {', '.join(map(describe, items))}"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "keys with values"
    return _WORDS.get(kind) or str(getattr(kind, "__name__", kind))


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "None",
    Any: "anything",
}

PLAIN = "it may be bool, int, float, str, None, Literal[...], or tuple[...], list[...], dict[str, ...] of these"

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fields(values: Mapping[Any, Any], kind: type, where: str) -> Any:
    """The dataclass `kind` of a mapping from its fields."""
    hints, prefix = _hints(kind), f"{where}." if where else ""
    for name in values:
        if name not in hints:
            raise Usage(f"{prefix}{name}: unknown key{nearest(str(name), hints)}")
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise Usage(f"{prefix}{field.name}: is missing")
    return kind(**{name: convert(value, hints[name], f"{prefix}{name}") for name, value in values.items()})


def _without_none(kind: Any) -> Any:
    """The type of an option that is given: `T` of `T | None`."""
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [arm for arm in get_args(kind) if arm is not type(None)]
        return functools.reduce(operator.or_, kinds)
    return kind


def _bounds(meta: Any) -> str:
    """What a constraint demands, in words."""
    if meta.gt is not None:
        return f" above {meta.gt:g}"
    if meta.ge is not None:
        return f" from {meta.ge} up" if meta.lt is None else f" from {meta.ge} to {meta.lt - 1}"
    if meta.min_length is not None:
        same = meta.min_length == meta.max_length
        return f"; {'exactly' if same else 'at least'} {meta.min_length}"
    return ""


def _check_plain(value: Any, where: str) -> None:
    """Raise `Usage` for what no record or file name can hold: some text, infinities, whole numbers of over 64 bits."""
    if isinstance(value, int) and abs(value) > LARGEST:
        raise Usage(f"{where}={_SHORT.repr(value)}: {TOO_LARGE}")
    if isinstance(value, float) and not math.isfinite(value):
        raise Usage(f"{where}={value}: must be a finite number")
    if isinstance(value, str):
        if type(value) is not str:  # such as a member of an enumeration, which is not written as the text that it is
            raise Usage(f"{where}={_SHORT.repr(value)}: must be plain text, not {type(value).__name__}")
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise Usage(f"{where}={_SHORT.repr(value)}: holds characters that are not text")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(key, where)
            _check_plain(item, where)
