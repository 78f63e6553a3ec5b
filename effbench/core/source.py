"""What source code says of a class: its fields with their types, defaults and the comments beside them.

A comment on the line of a field, which may go on below it, or alone on the lines above it, is the field's documentation
wherever it is shown.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import itertools
import math
import operator
import tokenize
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench.core.packages import class_file, module_file


@dataclass(frozen=True)
class Parameter:
    """A field of a class as its author wrote it."""

    name: str
    type: str
    default: str | None  # as a recipe has it, else, where no literal says it, as the source; None: to be given
    comment: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type}" + (f" = {self.default}" if self.default is not None else "")


READ = 1024  # modules that are kept, so that none is read twice before it changes
OPENED: set[Path] = set()  # files that were read in this process
OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}


@dataclass(frozen=True, eq=False)
class Module:
    """A module that has been read and not imported."""

    name: str
    tree: ast.Module
    text: str

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def find_class(self, name: str, before: float = math.inf) -> ast.ClassDef | None:
        """The class of that name at the top level, the last one that begins above line `before`."""
        nodes = [n for n in self.tree.body if isinstance(n, ast.ClassDef) and n.name == name and n.lineno < before]
        return nodes[-1] if nodes else None

    @functools.cached_property
    def imports(self) -> dict[str, str]:
        """What names in this module stand for: modules, and things in modules, with all their dots."""
        names: dict[str, str] = {}
        for node in _list_statements(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom):
                owner = "." * node.level + (node.module or "")
                if node.level:
                    with contextlib.suppress(ImportError):  # too many dots
                        owner = importlib.util.resolve_name(owner, self.name.rpartition(".")[0])
                names |= {alias.asname or alias.name: f"{owner}.{alias.name}" for alias in node.names}
        return names


def _list_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """All statements of a module, the outer ones first; expressions, which are most of a tree, are not looked into."""
    queue: deque[ast.AST] = deque([tree])
    while queue:
        for child in ast.iter_child_nodes(queue.popleft()):
            if isinstance(child, ast.stmt):
                yield child
            if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
                queue.append(child)


def read_module(path: Path, name: str = "") -> Module:
    """Read a file as the module `name`. Raises `SyntaxError` that names it, also for what is no text or no file."""
    try:
        state = path.stat()
        OPENED.add(path)
        return _read_once(path, name, state.st_size, state.st_mtime_ns)
    except (RecursionError, MemoryError):
        reason = "nested too deeply"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 at byte {error.start}"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except ValueError as error:  # null bytes, in some versions of Python
        reason = str(error)
    raise SyntaxError(reason, (str(path), None, None, None))


@functools.lru_cache(maxsize=READ)
def _read_once(path: Path, name: str, size: int, changed: int) -> Module:
    text = path.read_text(encoding="utf-8")
    return Module(name, ast.parse(text, str(path)), text)


def read_fields(node: ast.ClassDef, module: Module) -> dict[str, Parameter]:
    """The fields that a class of a module declares itself, in order."""
    fields: dict[str, Parameter] = {}
    for line, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            kind = ast.unparse(line.annotation)
            if not kind.removeprefix("typing.").startswith("ClassVar"):
                name, kind = line.target.id, _find_choices(kind, module) or kind
                comment = _comment(line, following, module.lines)
                fields[name] = Parameter(name, kind, _default(line.value, module), comment)
    return fields


def _find_choices(name: str, module: Module) -> str | None:
    """The `Literal[...]` that a name of a type stands for."""
    found = _find_value(name, module)
    value = "" if found is None else ast.unparse(found[0])
    return value if value.startswith("Literal[") else None


def _find_value(name: str, module: Module, elsewhere: bool = True) -> tuple[ast.expr, Module] | None:
    """What a module says that a name is, or the module it is imported from, and which of them that is."""
    for line in module.tree.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
            return line.value, module
        if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == name and line.value is not None:
            return line.value, module
    owner, _, attribute = module.imports.get(name, "").rpartition(".")
    file = module_file(owner) if elsewhere else None
    return _find_value(attribute, read_module(file, owner), elsewhere=False) if file is not None else None


def document_fields(cls: type) -> dict[str, Parameter]:
    """The fields of a class and of those that it inherits from, by name."""
    fields: dict[str, Parameter] = {}
    for ancestor in reversed(cls.__mro__):
        file = class_file(ancestor)
        if file is None:
            continue
        module = read_module(file)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and node.name == ancestor.__name__:
                fields |= read_fields(node, module)
                break
    return fields


def _default(value: ast.expr | None, module: Module) -> str | None:
    """A default as a recipe has it, else as written; that inside `field(...)` where it is given so."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in given:
            factory = given["default_factory"]
            value = factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], [])
        else:
            value = given.get("default")
    if value is None:
        return None
    try:
        found = repr(_evaluate(value, module))
        ast.literal_eval(found)
    except (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError):  # no literal says it
        return ast.unparse(value)
    return found


def _evaluate(node: ast.expr, module: Module) -> Any:
    """The value of literals, of names that a module gives to such, and of arithmetic with them.

    Raises `ValueError` for anything else, and what Python raises for a sum that has no value.
    """
    if isinstance(node, ast.Name):
        found = _find_value(node.id, module)
        if found is None:
            raise ValueError(node.id)
        return _evaluate(*found)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_evaluate(node.left, module), _evaluate(node.right, module))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_evaluate(node.operand, module))
    if isinstance(node, (ast.Tuple, ast.List)):
        return (tuple if isinstance(node, ast.Tuple) else list)(_evaluate(each, module) for each in node.elts)
    return ast.literal_eval(node)


def _comment(line: ast.stmt, following: ast.stmt | None, lines: list[str]) -> str:
    """The comment beside a statement and on the lines below, else that on the lines above it.

    What is below belongs to the statement that follows on its heels, if that has no comment beside it.
    """
    end = line.end_lineno or line.lineno
    beside = _list_beside(line, lines)
    if beside:
        below = list(itertools.takewhile(_is_comment, lines[end:]))
        theirs = following is not None and following.lineno == end + len(below) + 1
        if theirs and following is not None and not _list_beside(following, lines):
            below = []
        found = [*beside, *below]
    else:
        found = [*itertools.takewhile(_is_comment, reversed(lines[: line.lineno - 1]))][::-1]
    return " ".join(text.strip().lstrip("#").strip() for text in found)


def _is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _list_beside(line: ast.stmt, lines: list[str]) -> list[str]:
    """The comments on the lines of a statement."""
    statement = "\n".join(lines[line.lineno - 1 : line.end_lineno]).strip()
    tokens = tokenize.generate_tokens(io.StringIO(statement).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]
