"""What source code says of a class: its fields with their types, defaults and the comments beside them.

A comment on the line of a field, or alone on the lines above it, is the field's documentation wherever it is shown.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import math
import tokenize
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from effbench.core.packages import class_file, module_file


@dataclass(frozen=True)
class Parameter:
    """A field of a class as its author wrote it."""

    name: str
    type: str
    default: str | None  # None: has to be given
    comment: str

    def __str__(self) -> str:
        return f"{self.name}: {self.type}" + (f" = {self.default}" if self.default is not None else "")


READ = 1024  # modules that are kept, so that none is read twice before it changes
OPENED: set[Path] = set()  # files that were read in this process


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
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            kind = ast.unparse(line.annotation)
            if not kind.removeprefix("typing.").startswith("ClassVar"):
                name, kind = line.target.id, _find_choices(kind, module) or kind
                fields[name] = Parameter(name, kind, _default(line.value), _comment(line, module.lines))
    return fields


def _find_choices(name: str, module: Module, elsewhere: bool = True) -> str | None:
    """The `Literal[...]` that a name of a type stands for, here or in the module it is imported from."""
    for line in module.tree.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == name:
            value = ast.unparse(line.value)
            return value if value.startswith("Literal[") else None
    owner, _, attribute = module.imports.get(name, "").rpartition(".")
    file = module_file(owner) if elsewhere else None
    return _find_choices(attribute, read_module(file, owner), elsewhere=False) if file is not None else None


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


def _default(value: ast.expr | None) -> str | None:
    """A default as written; that inside `field(...)` where it is given so."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in given:
            factory = given["default_factory"]
            return ast.unparse(factory.body if isinstance(factory, ast.Lambda) else ast.Call(factory, [], []))
        value = given.get("default")
    return None if value is None else ast.unparse(value)


def _comment(line: ast.stmt, lines: list[str]) -> str:
    """The comment beside a statement, else the lines of comment above it."""
    end = line.end_lineno or line.lineno
    statement = "\n".join(lines[line.lineno - 1 : end]).strip()
    beside = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(statement).readline)
        if token.type == tokenize.COMMENT
    ]
    above: list[str] = []
    for text in reversed(lines[: line.lineno - 1]):
        if not text.lstrip().startswith("#"):
            break
        above.insert(0, text)
    return " ".join(text.strip().lstrip("#").strip() for text in beside or above)
