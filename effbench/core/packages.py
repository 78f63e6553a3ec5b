"""Folders of methods outside effbench, imported as packages of their own.

A folder becomes a package named after a digest of its path. Modules in it import each other as in any package
(`from ._common import x`), two folders never mix, and nothing else is shadowed, whatever the files are called.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path

from effbench.core.paths import PACKAGE

PREFIX = "effbench_methods_"
SHIPPED = "effbench.methods."
AUTHORED = (SHIPPED, PREFIX)  # how the names of modules of methods begin


def package(folder: Path) -> str:
    """Name of the package whose modules are the files and folders in `folder`."""
    folder = absolute(folder)
    name = PREFIX + hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    if name not in sys.modules:
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = importlib.util.module_from_spec(spec)
    return name


def module_file(name: str) -> Path | None:
    """File of a module of effbench or of one of these packages; None for any other, and where there is no file."""
    top, _, rest = name.partition(".")
    if top == "effbench":
        folder = PACKAGE
    elif top.startswith(PREFIX) and top in sys.modules and rest:  # the package itself runs no file
        folder = Path(sys.modules[top].__path__[0])
    else:
        return None
    path = folder.joinpath(*rest.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def method_key(cls: type) -> str:
    """Name of a method class in recipes: the stem of its file in a family, FILE:CLASS for any other file."""
    top, _, rest = cls.__module__.partition(".")
    if top.startswith(PREFIX) and "." not in rest:
        return f"{module_file(cls.__module__)}:{cls.__name__}"
    return cls.__module__.rpartition(".")[2]


def class_file(cls: type) -> Path | None:
    """File that defines a class; None where there is none, as for a class typed at a prompt."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return None if file is None else Path(file)


def method_line(error: BaseException) -> str:
    """` (FILE:LINE)` of the innermost call in a method's file that an exception passed; empty if it passed none."""
    line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith(AUTHORED):
            line = f" ({shorten(Path(frame.f_code.co_filename))}:{number})"
    return line


def shorten(path: Path) -> str:
    """A method's file as messages name it: from `methods/` on, or with its folder where it lies elsewhere."""
    return str(path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else Path(path.parent.name, path.name))


def absolute(path: Path | str) -> Path:
    """The path with `~` and `..` worked out and links kept."""
    return Path(os.path.abspath(Path(path).expanduser()))
