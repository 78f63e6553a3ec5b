"""Methods by name. The registry is the folder tree: `methods/<family>/<key>.py` defines the method `key`.

Names, papers and parameters are read from source without importing, so listing needs no torch; a class is imported
when a recipe asks for it. `EFFBENCH_METHODS` may name further folders of the same shape, separated as in PATH, and
`FILE.py:CLASS` names a method in any other file.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from effbench.core.errors import Usage
from effbench.core.kept import keep, recall
from effbench.core.kinds import BASES, KINDS, kind_of
from effbench.core.lineage import trace
from effbench.core.method import Method
from effbench.core.packages import SHIPPED, absolute, method_line, package
from effbench.core.paths import PACKAGE, SUITES
from effbench.core.provenance import check_imports
from effbench.core.source import OPENED, Module, Parameter, document_fields, read_fields, read_module
from effbench.core.usage import named_path, nearest

VARIABLE = "EFFBENCH_METHODS"
FILE = re.compile(r"(?P<file>.+\.py)(:(?P<cls>\w+))?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a method without importing it."""

    key: str
    family: str  # folder that holds the file; empty for FILE.py:CLASS
    kind: str  # `broken` for a file that defines no method
    paper: str
    summary: str  # first line of the module's docstring; of a broken file, what is wrong with it
    about: str  # docstring of the class
    parameters: dict[str, Parameter]
    facts: dict[str, Any]  # literal class attributes: needs, published, caveats ...
    path: Path
    cls: str
    module: str


def roots() -> list[Path]:
    """Folders that hold families of methods. Raises `Usage` where `EFFBENCH_METHODS` names anything else."""
    given = os.environ.get(VARIABLE, "")
    return [
        PACKAGE / "methods",
        *dict.fromkeys(_checked(absolute(named_path(VARIABLE, part))) for part in given.split(os.pathsep) if part),
    ]


def _checked(root: Path) -> Path:
    shape = "it names folders that hold FAMILY/NAME.py"
    if not root.is_dir():
        raise Usage(f"{VARIABLE}: {root} is {'no folder' if root.exists() else 'not there'}; {shape}")
    flat = sorted(root.glob("*.py"))
    if flat and not any(_files(root)):
        raise Usage(f"{VARIABLE}: {root} holds {flat[0].name} itself; {shape}: name the folder above, {root.parent}")
    return root


def _files(root: Path) -> list[Path]:
    """Files of methods in a folder of families; names that begin with a dot or an underscore are private."""
    files = (path for path in root.glob("*/*.py") if path.stem[0] != "_" and path.parent.name[0] not in "._")
    return sorted(files)


def catalog() -> dict[str, Entry]:
    """Every method by key, sorted. Raises `Usage` when two files share a key."""
    return dict(_catalog(tuple(roots())))


@functools.cache
def _catalog(folders: tuple[Path, ...]) -> dict[str, Entry]:
    parents = {root: SHIPPED if root == PACKAGE / "methods" else f"{package(root)}." for root in folders}
    sources = [path for root in folders for path in _files(root)]
    name = f"methods-{hashlib.sha256(str(folders).encode()).hexdigest()[:16]}"
    kept = recall(name, sources)  # parsing takes longer than a listing may
    if kept is not None:
        return {row["key"]: _restore(row) for row in kept}
    entries: dict[str, Entry] = {}
    for root in folders:
        for path in _files(root):
            if path.stem in entries:
                raise Usage(f"two methods are called {path.stem!r}: {entries[path.stem].path} and {path}")
            entries[path.stem] = _family_entry(path, parents[root])
    entries = dict(sorted(entries.items()))
    there = [path for path in OPENED if path.is_file()]  # nothing here follows from one that is gone
    keep(name, sources, [*there, *Path(__file__).parent.glob("*.py")], list(map(_plain, entries.values())))
    return entries


def _plain(entry: Entry) -> dict[str, Any]:
    """An entry in plain values."""
    return dataclasses.asdict(entry) | {"path": str(entry.path)}


def _restore(row: dict[str, Any]) -> Entry:
    parameters = {name: Parameter(**values) for name, values in row["parameters"].items()}
    return Entry(**row | {"path": Path(row["path"]), "parameters": parameters})


def _family_entry(path: Path, parent: str) -> Entry:
    """The method that a file in a family is named after; `parent` is the package that the family is in."""
    family, key = path.parent.name, path.stem
    module = f"{parent}{family}.{key}"
    try:
        if not (key.isidentifier() and family.isidentifier()):
            raise SyntaxError("its name and its folder's may hold letters, digits and _ only")
        source = read_module(path, module)
        wanted = key.replace("_", "").lower()
        classes = [n for n in source.tree.body if isinstance(n, ast.ClassDef) and n.name.lower() == wanted]
        if len(classes) != 1:
            raise SyntaxError(f"defines no class {wanted!r} (capitals as in the paper)")
        return _entry(key, family, path, classes[0], source)
    except SyntaxError as error:
        reason = str(error) if error.lineno is None else f"cannot be read: {error}"
        return Entry(key, family, "broken", "", reason, "", {}, {}, path, "", module)


def _entry(key: str, family: str, path: Path, node: ast.ClassDef, source: Module) -> Entry:
    """What the source of a class says of a method."""
    lineage, base = trace(node, source)
    parameters = dict(_base_fields(base)) if base in BASES else {}
    facts: dict[str, Any] = {}
    for ancestor, module in lineage:
        parameters |= read_fields(ancestor, module)
        for line in ancestor.body:
            target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
            value = getattr(line, "value", None)
            if isinstance(target, ast.Name) and target.id not in parameters and value is not None:
                try:
                    facts[target.id] = ast.literal_eval(value)
                except ValueError:
                    continue  # no fact but code
    return Entry(
        key=key,
        family=family,
        kind=kind_of(BASES[base]) if base in BASES else "apply",
        paper=facts.pop("paper", ""),
        summary=(ast.get_docstring(source.tree) or "").partition("\n")[0],
        about=ast.get_docstring(node) or "",
        parameters=parameters,
        facts=facts,
        path=path,
        cls=node.name,
        module=source.name,
    )


@functools.cache
def _base_fields(base: str) -> dict[str, Parameter]:
    """The fields that all methods with a base have."""
    return document_fields(BASES[base])


def entry(key: str) -> Entry:
    """What is known of a method by its name or as FILE.py:CLASS. Raises `Usage` for an unknown or broken one."""
    reference = FILE.fullmatch(key)
    if reference is None:
        entries = catalog()
        if key not in entries:
            raise Usage(f"unknown method {key!r}{nearest(key, [*entries, *presets()])}")
        if entries[key].kind == "broken":
            raise Usage(f"method {key!r}: {entries[key].path} {entries[key].summary}")
        return entries[key]
    entries = {method.cls: method for method in entries_in(reference["file"])}
    if reference["cls"] is None:
        raise Usage(f"{key}: name the class, {' or '.join(f'{key}:{name}' for name in entries)}")
    if reference["cls"] not in entries:
        raise Usage(f"{reference['file']}: defines no method {reference['cls']!r}{nearest(reference['cls'], entries)}")
    return entries[reference["cls"]]


def find(name: str) -> Entry:
    """`entry`, which for a FILE.py that defines one method needs no class. Raises `Usage`."""
    reference = FILE.fullmatch(name)
    if reference is not None and reference["cls"] is None:
        entries = entries_in(name)
        if len(entries) == 1:
            return entries[0]
    return entry(name)


def entries_in(file: str) -> list[Entry]:
    """The methods that a file defines; what is in the catalog keeps its key. Raises `Usage` for a file without any."""
    path = absolute(named_path("file", file))
    if path.suffix != ".py":
        raise Usage(f"{file}: methods are defined in a FILE.py, suites in a FILE.yaml")
    if not path.is_file():
        raise Usage(f"{file}: no such file")
    if not path.stem.isidentifier():
        raise Usage(f"{file}: the file's name may hold letters, digits and _ only")
    named = [known for known in catalog().values() if known.path.name == path.name and known.path.samefile(path)]
    try:
        source = read_module(path, f"{package(path.parent)}.{path.stem}")
        entries = [
            _entry(f"{path}:{node.name}", "", path, node, source)
            for node in source.tree.body
            if isinstance(node, ast.ClassDef)
            and trace(node, source)[1] is not None
            and node.name not in {known.cls for known in named}
        ]
    except SyntaxError as error:
        raise Usage(f"{file}: cannot be read: {error}") from None
    if not named + entries:
        raise Usage(f"{file}: defines no method: a class whose base is {', '.join(KINDS)} or Method")
    return named + entries


def load(key: str) -> type[Method]:
    """The class of a method. Raises `Usage` for an unknown name or a file that cannot be imported."""
    known = entry(key)
    try:
        check_imports(known.module)
        importlib.invalidate_caches()  # the file may be younger than the folder's listing
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            module = importlib.import_module(known.module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the file raises is its own fault
        reason = str(error) if isinstance(error, Usage | SyntaxError) else repr(error)
        hint = "; write @dataclass(frozen=True) above the class" if "non-frozen dataclass" in reason else ""
        raise Usage(f"method {key!r}: {known.path} cannot be imported: {reason}{method_line(error)}{hint}") from error
    cls: Any = getattr(module, known.cls, None)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise Usage(f"method {key!r}: {known.cls} in {known.path} is not a Method")
    cls.check_definition()
    return cls


@contextlib.contextmanager
def blame_method(key: str) -> Iterator[None]:
    """Turn what a method's own code raises here into `Usage` that names its line; what it prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Usage, KeyboardInterrupt):
        raise
    except BaseException as error:  # as when it is imported
        raise Usage(f"method {key!r}: {error!r}{method_line(error)}") from error


@functools.cache
def presets() -> dict[str, str]:
    """Named step strings of `suites/presets.yaml`."""
    texts = yaml.safe_load((SUITES / "presets.yaml").read_text()) or {}
    return {str(name): str(steps) for name, steps in texts.items()}
