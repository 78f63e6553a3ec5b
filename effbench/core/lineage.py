"""What a class of methods inherits, read from source: the classes above it, and the base of methods they end in."""

from __future__ import annotations

import ast

from effbench.core.kinds import BASES
from effbench.core.packages import module_file
from effbench.core.source import Module, read_module

CONTRACT = ("effbench.core.kinds", "effbench.core.method")  # where the bases of all methods are defined

Lineage = list[tuple[ast.ClassDef, Module]]  # classes from the top down, each with the module that defines it


def trace(node: ast.ClassDef, module: Module) -> tuple[Lineage, str | None]:
    """A class behind those that it inherits from within the code of methods, and the base of methods that it has: the
    name of one in `BASES`, or `apply` for `Method` itself; None where it has none.

    It is that of the first class that has one; bases without one, such as settings that classes share, count too.

    Bases are followed however they are written (`Weights`, `kinds.Weights`, `_common.Base`) and from file to file.
    Raises `SyntaxError` for a file on the way that cannot be read.
    """
    return _trace_class(node, module, frozenset())


def _trace_class(node: ast.ClassDef, module: Module, seen: frozenset[str]) -> tuple[Lineage, str | None]:
    lineage: Lineage = []
    root = None
    for base in reversed(node.bases):  # what the first base says stands
        above, found = _trace_name(ast.unparse(base), module, node.lineno, seen)
        lineage += above
        root = found or root
    return [*lineage, (node, module)], root


def _trace_name(name: str, module: Module, before: float, seen: frozenset[str]) -> tuple[Lineage, str | None]:
    """`trace` of what a name stands for above line `before` of a module."""
    node = module.find_class(name, before)
    if node is not None:
        return _trace_class(node, module, seen)
    first, dot, rest = name.partition(".")
    target = module.imports.get(first, first) + dot + rest
    owner, _, attribute = target.rpartition(".")
    if owner in CONTRACT:
        return [], "apply" if attribute == "Method" else attribute if attribute in BASES else None
    file = module_file(owner)
    if file is None or target in seen:
        return [], None
    other = read_module(file, owner)
    return _trace_name(attribute, other, len(other.lines) + 1, seen | {target})
