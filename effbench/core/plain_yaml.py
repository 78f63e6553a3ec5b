"""YAML of which every value is read as written: `010` is ten, `1:30`, `0x10` and `yes` are text.

Whole numbers, decimal numbers, true, false and null are those of the core schema of YAML 1.2. YAML 1.1, which PyYAML
reads by default, also knows octal and base-60 numbers, dates and more words for true. Anchors, tags and repeated keys
are refused: a value stands where it is written, once.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from effbench.core.errors import Usage

SCALARS = {  # tag: how such a value is written, characters that it may begin with
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
}


def read(text: str) -> Any:
    """The value that `text` writes. Raises `Usage` with one line where it is not YAML, or more than plain YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        context = f"{error.context}: " if error.context else ""
        raise Usage(f"{place}{context}{error.problem}") from None
    except yaml.YAMLError as error:  # of characters that no text holds
        raise Usage(" ".join(str(error).split())) from None
    except RecursionError:
        raise Usage("is nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the scalars of `SCALARS` and without tags and anchors."""

    yaml_implicit_resolvers: Any = {}
    yaml_constructors: ClassVar[Any] = {}

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: anchors (& and *) are not read; write it out")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: tags (!) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        values: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            key = self.construct_object(key_node)
            if key in values:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            values[key] = self.construct_object(value_node, deep=True)
        return values

    def construct_int(self, node: ScalarNode) -> int:
        try:
            return int(node.value)
        except ValueError:  # Python reads no more than some thousands of digits
            raise yaml.constructor.ConstructorError(None, None, "the number is too long", node.start_mark) from None


def _add(tag: str, construct: Any) -> None:
    _Loader.add_constructor(f"tag:yaml.org,2002:{tag}", construct)


for _tag, (_pattern, _first) in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_add("null", lambda loader, node: None)
_add("bool", lambda loader, node: node.value.lower() == "true")
_add("int", _Loader.construct_int)
_add("float", lambda loader, node: float(node.value))
_add("str", lambda loader, node: node.value)
_add("seq", lambda loader, node: loader.construct_sequence(node, deep=True))
_add("map", lambda loader, node: loader.construct_mapping(node))
