"""Which source decides a number, and its digest.

The source of a measurement is what its entry modules import, directly or not, from effbench or from the folder of an
outside method. Comments, docstrings, blank lines and what only type checkers import decide nothing and are left out.
The digest is of text, not of a syntax tree, because trees of one text differ between Python versions.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from effbench.core.errors import Usage
from effbench.core.packages import PREFIX, module_file
from effbench.core.paths import PACKAGE

ROOT = PACKAGE.name  # its own module holds the version and is no part of a digest: a release changes no number
IMPORTING = re.compile(r"(\w+\.)*(import_module|__import__)")
LAZY = re.compile(r"([\w.]+):\w+")  # how kernels name a function that is imported when it is called


def digest_source(*modules: str) -> str:
    """SHA-256 of the source that the named modules run. Raises `ValueError` for a name that is no module of ours."""
    return _digest_source(tuple(sorted(modules)))


@functools.cache
def _digest_source(modules: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(follow_imports(modules).items()):
        digest.update(f"{name}\0{_read(path).text}\0".encode())
    return digest.hexdigest()


def follow_imports(modules: Iterable[str]) -> dict[str, Path]:
    """Files of the named modules and of all that they import, by module name. Raises `ValueError`."""
    files: dict[str, Path] = {}
    queue = list(modules)
    for name in queue:
        if module_file(name) is None:
            raise ValueError(f"{name} is no module of effbench")
    while queue:
        name = queue.pop()
        path = module_file(name)
        if name in files or path is None or name == ROOT:
            continue
        files[name] = path
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        queue += _parents(name)  # importing a module runs the packages that it is in
        queue += (absolute for imported in _read(path).imports if (absolute := _absolute(imported, package)))
    return files


def check_imports(module: str) -> None:
    """Raise `Usage` where a file of an outside folder imports another in a way that its digest could not follow."""
    if not module.startswith(PREFIX):
        return
    files = {name: path for name, path in _follow_readable(module).items() if name.startswith(PREFIX)}
    for path in files.values():
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                beside = [alias.name for alias in node.names if _lies_beside(alias.name, path)]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                beside = [node.module] if node.module and _lies_beside(node.module, path) else []
            elif isinstance(node, ast.Call) and IMPORTING.fullmatch(ast.unparse(node.func)):
                wanted = node.args[0] if node.args else None
                constant = wanted.value if isinstance(wanted, ast.Constant) and isinstance(wanted.value, str) else "."
                beside = [ast.unparse(node)] if constant[:1] == "." or _lies_beside(constant, path) else []
            else:
                continue
            if beside:
                raise Usage(
                    f"{path}, line {node.lineno}: {beside[0]} would be read without being part of what is measured; "
                    "write `from . import NAME` for a file beside it"
                )


def _follow_readable(module: str) -> dict[str, Path]:
    """`follow_imports`; only the module itself where one of the files is no Python, which importing it will say."""
    try:
        return follow_imports([module])
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return {}


def _lies_beside(module: str, path: Path) -> bool:
    """Whether an absolute import names what lies in the folder of a file and is not installed under that name."""
    top = module.partition(".")[0]
    there = [path.with_name(f"{top}.py"), path.with_name(top) / "__init__.py"]
    return bool(top) and top not in sys.stdlib_module_names and any(file.is_file() for file in there)


def _parents(module: str) -> Iterator[str]:
    while module := module.rpartition(".")[0]:
        yield module


def _absolute(module: str, package: str) -> str:
    """A module name without leading dots, as seen from `package`."""
    name = module.lstrip(".")
    above = len(module) - len(name) - 1
    if above < 0:
        return name
    base = package.split(".")
    base = base[: len(base) - above]
    return ".".join([*base, name] if name else base)


class _Source:
    """What of a file counts: its text without comments and docstrings, and the modules that it may import."""

    def __init__(self, content: str) -> None:
        tree = ast.parse(content)
        self.imports = frozenset(_imports(tree))
        self.text = strip_prose(content, tree)


def _read(path: Path) -> _Source:
    status = path.stat()
    return _read_once(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _read_once(path: Path, size: int, changed: int) -> _Source:
    return _Source(path.read_text(encoding="utf-8"))


def strip_prose(content: str, tree: ast.Module | None = None) -> str:
    """Python source without comments, docstrings, blank lines and space at the ends of lines."""
    lines = content.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(content) if tree is None else tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and _docstring(node):
            _cut(lines, node.body[0])
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _cut(lines: list[str], node: ast.stmt) -> None:
    """Empty the place of a statement, and leave what else stands in its lines."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    first, last = node.lineno - 1, node.end_lineno - 1
    after = lines[last].encode()[node.end_col_offset :].decode()  # columns of syntax trees count bytes
    before = lines[first].encode()[: node.col_offset].decode()
    lines[first : last + 1] = [""] * (last - first + 1)
    lines[first] = before + after


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def _imports(node: ast.AST) -> Iterator[str]:
    """Names that may be modules: of import statements, and of strings such as "effbench.kernels.op.triton:run"."""
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = node.orelse
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        yield base
        yield from (f"{base}.{alias.name}" if node.module else f"{base}{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (named := LAZY.fullmatch(node.value)):
        yield named[1]
    for child in children:
        yield from _imports(child)
