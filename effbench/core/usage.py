"""Checks of what a user wrote, on the command line and in files: a mistake is `Usage`, one line with the mend."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from effbench.core.errors import Usage


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x' or 'y'?` for the nearest choices, or the list of them."""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there is {', '.join(sorted(choices)) or 'none'}"


T = TypeVar("T")


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list[int]": "a list such as [0,1,2]",
}


def one_of(name: str, value: str | None, choices: Iterable[str]) -> None:
    """Raise `Usage` unless `value` is None or one of `choices`."""
    if value is not None and value not in (choices := list(choices)):
        raise Usage(f"unknown {name} {value!r}{nearest(value, choices)}")


def parse(kind: type[T], arguments: Iterable[str], **flags: bool) -> T:
    """The options in `key=value` arguments. Raises `Usage`."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    fields = {field.name: str(field.type).removesuffix(" | None") for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = dict(flags)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name in fields and not text:
            raise Usage(f"{argument!r}: write {name}=VALUE, or leave the option out")
        if not equals:
            raise Usage(f"unexpected {argument!r}: options are written key=value")
        if name not in fields:
            raise Usage(f"unknown option {name!r}{nearest(name, fields)}")
        if name in values:
            raise Usage(f"option {name} is given twice")
        values[name] = text
        if fields[name] == "str":  # as typed: a recipe is not YAML
            continue
        try:
            values[name] = OmegaConf.from_dotlist([argument])[name]
            typed(kind, {name: values[name]})
        except (Usage, YAMLError):
            raise Usage(f"{name}={text}: must be {KINDS[fields[name]]}") from None
    return typed(kind, values)


def typed(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass from plain, maybe nested values. Raises `Usage` that starts with the key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values)))
    except ConfigKeyError as error:
        choices = [field.name for field in dataclasses.fields(error.object_type)] if error.object_type else []
        raise Usage(f"{error.full_key}: unknown key{nearest(str(error.key), choices)}") from None
    except OmegaConfBaseException as error:
        raise Usage(f"{error.full_key}: {str(error).splitlines()[0]}") from None
