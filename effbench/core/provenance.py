"""Which source decides a number, and its digest.

The source of a measurement is what its entry modules import, directly or not, from effbench or from the folder of an
outside method. A method may import in no way that hides a file of its author's: see `check_imports`. Comments,
docstrings, blank lines and what only type checkers import decide nothing and are left out. The digest is of text, not
of a syntax tree, because trees of one text differ between Python versions.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from effbench.core.errors import Usage
from effbench.core.packages import AUTHORED, module_file
from effbench.core.paths import PACKAGE
from effbench.core.source import READ, Module, read_module

ROOT = PACKAGE.name  # its own module holds the version and is no part of a digest: a release changes no number
LAZY = re.compile(rf"({ROOT}\.[\w.]+):\w+")  # how kernels name a function that is imported when it is called
IMPORTERS = ("importlib.import_module", "__import__", "builtins.__import__")  # run the module that an argument names
HIDING = (  # run files, or have files found, that no name of a module tells
    "sys.path",
    "site.addsitedir",
    "importlib.util.spec_from_file_location",
    "importlib.machinery.SourceFileLoader",
    "runpy.run_path",
    "runpy.run_module",
    "exec",
    "builtins.exec",
)


def digest_source(*modules: str) -> str:
    """SHA-256 of the source that the named modules run. Raises `ValueError` for a name that is no module of ours."""
    return _digest_source(tuple(sorted(modules)))


@functools.cache
def _digest_source(modules: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(follow_imports(modules).items()):
        digest.update(f"{name}\0{_read(path, name).text}\0".encode())
    return digest.hexdigest()


def follow_imports(modules: Iterable[str], within: tuple[str, ...] = ("",)) -> dict[str, Path]:
    """Files of the named modules and of all that they import, by module name.

    within  beginnings of the names of modules that are looked at

    Raises `ValueError` for a name that is no module of ours, `SyntaxError` for a file that cannot be read.
    """
    files: dict[str, Path] = {}
    queue = list(modules)
    for name in queue:
        if module_file(name) is None:
            raise ValueError(f"{name} is no module of effbench")
    while queue:
        name = queue.pop()
        path = module_file(name)
        if name in files or path is None or name == ROOT or not name.startswith(within):
            continue
        files[name] = path
        queue += _parents(name)  # importing a module runs the packages that it is in
        package = _package(name, path)
        queue += (absolute for imported in _read(path, name).imports if (absolute := _absolute(imported, package)))
    return files


def check_imports(module: str) -> None:
    """Raise `Usage` where the digest of a method's module would miss a file of its author's.

    A plain `import x` of a file beside the method works or not by the folder that a program is started from, and a
    module that is named when the code runs is known to nobody before. Raises `SyntaxError` for a file that cannot be
    read.
    """
    for name, path in follow_imports([module], AUTHORED).items():
        source = _read(path, name)
        for code, line in source.hiding.items():
            raise Usage(
                f"{path}:{line}: {code} may run files that would be no part of the method's digest; import a file "
                "beside it as `from . import x`, and name folders of libraries in PYTHONPATH"
            )
        for imported, line in source.imports.items():
            top = imported.partition(".")[0]  # empty for a relative import
            for dots, folder in enumerate(path.parents[: _package(name, path).count(".") + 1], start=1):
                if top not in ("", ROOT) and _means_file_in(folder, top):
                    mend = f"write `from {'.' * dots} import {top}`"
                    raise Usage(f"{path}:{line}: {top} would be no part of the method's digest; {mend}")


def _means_file_in(folder: Path, top: str) -> bool:
    """Whether a plain `import top` means something in a folder, or nothing but what lies there can be meant."""
    if not ((folder / f"{top}.py").is_file() or (folder / top).is_dir()):
        return False
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # of a module that tells nothing of itself, such as the main program
        return False
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    return spec is None or any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places if place)


def _package(module: str, path: Path) -> str:
    """What relative imports in a module's file are relative to."""
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


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
    """What of a file counts: its text without comments and docstrings, and the modules that it may import.

    Modules that are imported by calls are looked for in the files of methods alone: the library names there what a
    recipe names too, which is a root of its digest itself.
    """

    def __init__(self, module: Module, authored: bool) -> None:
        self.text = strip_prose(module.text, module.tree)
        self.imports = dict(_imports(module.tree))  # name: line
        self.hiding: dict[str, int] = {}  # code that imports what it does not name: line
        if authored:
            for node, name in _calls(module):
                names = self.hiding if name is None else self.imports
                names.setdefault(name or ast.unparse(node), node.lineno)


def _read(path: Path, name: str) -> _Source:
    return _look_into(read_module(path), name.startswith(AUTHORED))


@functools.lru_cache(maxsize=READ)
def _look_into(module: Module, authored: bool) -> _Source:
    return _Source(module, authored)


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


def _imports(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that may be modules, with their lines: of import statements, and of strings such as
    "effbench.kernels.op.triton:run"."""
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = node.orelse
    elif isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        yield base, node.lineno
        inside = f"{base}." if node.module else base
        yield from ((f"{inside}{alias.name}", node.lineno) for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (named := LAZY.fullmatch(node.value)):
        yield named[1], node.lineno
    for child in children:
        yield from _imports(child)


def _calls(module: Module) -> Iterator[tuple[ast.expr, str | None]]:
    """Code that imports other than by a statement, each with the name of the module; None where it does not tell."""
    known = module.imports
    told: dict[ast.expr, str] = {}  # functions whose call tells it
    for node in ast.walk(module.tree):  # calls come before what is called
        if isinstance(node, ast.Call) and (name := _told(node)):
            told[node.func] = name
        elif isinstance(node, ast.Attribute | ast.Name):
            means = _dotted(node, known)
            if means in IMPORTERS or means in HIDING:
                yield node, told.get(node) if means in IMPORTERS else None


def _dotted(node: ast.expr, known: dict[str, str]) -> str:
    """What a name stands for, with all its dots; empty for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, known)}.{node.attr}"
    return known.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _told(call: ast.Call) -> str | None:
    """The module that a call imports, in dots as a statement writes it; None unless the call spells it out."""
    name, *others = [*call.args, *(keyword.value for keyword in call.keywords)] or [ast.Constant(None)]
    if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
        return None
    relative = name.value.startswith(".")
    return name.value if [ast.unparse(other) for other in others] == ["__package__"] * relative else None
