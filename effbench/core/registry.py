"""Methods by name. The registry is the folder tree: `methods/<family>/<key>.py` defines the method `key`.

Names, papers and parameters are read from source without importing, so listing needs no torch; a class is imported
when a recipe asks for it. `EFFBENCH_METHODS` may name further folders of the same shape, separated as in PATH.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from effbench.core.errors import Usage
from effbench.core.kinds import KINDS
from effbench.core.method import Method
from effbench.core.paths import PACKAGE, SUITES
from effbench.core.usage import nearest


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a method without importing it."""

    key: str
    family: str
    kind: str
    paper: str
    summary: str  # first line of the module's docstring
    parameters: dict[str, str]  # name: "type = default" as written
    facts: dict[str, Any]  # literal class attributes: needs, type, weight_update ...
    path: Path
    cls: str
    module: str


def roots() -> list[Path]:
    """Folders that hold families of methods."""
    extra = os.environ.get("EFFBENCH_METHODS", "")
    return [PACKAGE / "methods", *(Path(part) for part in extra.split(os.pathsep) if part)]


def catalog() -> dict[str, Entry]:
    """Every method by key, sorted. Raises `Usage` when two files share a key."""
    return dict(_catalog(tuple(roots())))


@functools.cache
def _catalog(folders: tuple[Path, ...]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for root in folders:
        for path in sorted(root.glob("*/*.py")):
            if path.stem.startswith("_"):
                continue
            entry = _entry(path, root)
            if entry.key in entries:
                raise Usage(f"two methods are called {entry.key!r}: {entries[entry.key].path} and {path}")
            entries[entry.key] = entry
    return dict(sorted(entries.items()))


def _entry(path: Path, root: Path) -> Entry:
    family = path.parent.name
    module = f"effbench.methods.{family}.{path.stem}" if root == PACKAGE / "methods" else path.stem
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        return Entry(path.stem, family, "broken", "", f"cannot be read: {error}", {}, {}, path, "", module)
    wanted = path.stem.replace("_", "")
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.lower() == wanted}
    if len(classes) != 1:
        reason = f"defines no class {wanted!r} (capitals as in the paper)"
        return Entry(path.stem, family, "broken", "", reason, {}, {}, path, "", module)
    ((name, node),) = classes.items()
    lineage, kind = _lineage(node, tree)
    parameters: dict[str, str] = {}
    facts: dict[str, Any] = {}
    for line in itertools.chain.from_iterable(ancestor.body for ancestor in lineage):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            note = ast.unparse(line.annotation)
            if not note.startswith("ClassVar"):
                default = f" = {ast.unparse(line.value)}" if line.value else ""
                parameters[line.target.id] = note + default
            elif line.value is not None:
                _literal(facts, line.target.id, line.value)
        elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            _literal(facts, line.targets[0].id, line.value)
    return Entry(
        key=path.stem,
        family=family,
        kind=kind,
        paper=facts.pop("paper", ""),
        summary=(ast.get_docstring(tree) or "").partition("\n")[0],
        parameters=parameters,
        facts=facts,
        path=path,
        cls=name,
        module=module,
    )


def _lineage(node: ast.ClassDef, tree: ast.Module) -> tuple[list[ast.ClassDef], str]:
    """The class behind those that it inherits from within its family, and the kind they all are of."""
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    for base in bases:
        if base == Method.__name__:
            continue
        if base in KINDS:
            return [node], base
        for line in tree.body:
            if isinstance(line, ast.ClassDef) and line.name == base:
                found, kind = _lineage(line, tree)
                return [*found, node], kind
            imported = isinstance(line, ast.ImportFrom) and any(alias.name == base for alias in line.names)
            file = _file(line.module) if imported and isinstance(line, ast.ImportFrom) else None
            if file is not None:
                other = ast.parse(file.read_bytes())
                parent = next(n for n in other.body if isinstance(n, ast.ClassDef) and n.name == base)
                found, kind = _lineage(parent, other)
                return [*found, node], kind
    return [node], "apply"


def _source(module: str | None) -> Path | None:
    """File of a module of the package whose code decides what a method computes; None for any other."""
    parts = (module or "").split(".")
    return _file(module) if len(parts) > 2 and parts[1] in ("methods", "formats", "kernels") else None


def _file(module: str | None) -> Path | None:
    """File of a module of the package; None for any other."""
    top, *parts = (module or "").split(".")
    file = PACKAGE.joinpath(*parts).with_suffix(".py")
    return file if top == "effbench" and parts and file.is_file() else None


def _literal(facts: dict[str, Any], name: str, value: ast.expr) -> None:
    try:
        facts[name] = ast.literal_eval(value)
    except ValueError:
        return


def load(key: str) -> type[Method]:
    """The class of a method. Raises `Usage` for an unknown name or a file that cannot be imported."""
    entries = catalog()
    if key not in entries:
        raise Usage(f"unknown method {key!r}{nearest(key, [*entries, *presets()])}")
    entry = entries[key]
    if entry.kind == "broken":
        raise Usage(f"method {key!r}: {entry.path} {entry.summary}")
    try:
        module = _import(entry)
    except Exception as error:
        raise Usage(f"method {key!r}: {entry.path} cannot be imported: {error!r}") from error
    cls: type[Method] = getattr(module, entry.cls)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise Usage(f"method {key!r}: {entry.cls} in {entry.path} is not a Method")
    return cls


def _import(entry: Entry) -> ModuleType:
    if entry.module.startswith("effbench."):
        return importlib.import_module(entry.module)
    if entry.module not in sys.modules:
        spec = importlib.util.spec_from_file_location(entry.module, entry.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[entry.module] = module  # dataclasses and pickle look their module up by name
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[entry.module]
            raise
    return sys.modules[entry.module]


@functools.cache
def presets() -> dict[str, str]:
    """Named step strings of `suites/presets.yaml`."""
    found = yaml.safe_load((SUITES / "presets.yaml").read_text()) or {}
    return {str(name): str(steps) for name, steps in found.items()}


def module_file(module: str) -> Path | None:
    """The file of a module outside effbench that holds a method; None for all others."""
    return next((entry.path for entry in catalog().values() if entry.module == module), None)
