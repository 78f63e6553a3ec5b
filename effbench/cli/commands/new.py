"""`effbench new`: write the file of a new method, which works and passes `effbench check`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import keyword
import os
import re
import shlex
import sys
from pathlib import Path

from effbench.cli import templates
from effbench.cli.command import Command
from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.kinds import KINDS
from effbench.core.usage import named_path, nearest, parse

EXAMPLE = "Example"  # the class of every template


@dataclasses.dataclass
class NewOptions:
    """What `effbench new` can be told."""

    to: str = "."  # folder of the file: a family of methods, such as methods/quant, or any other


def _new(arguments: argparse.Namespace) -> int:
    options = parse(NewOptions, arguments.options)
    if arguments.what != "method":
        raise Usage(f"cannot write a new {arguments.what!r}: effbench new method KIND NAME")
    text = write_template(arguments.kind, arguments.name)
    folder = named_path("to", options.to)
    path = folder / f"{arguments.name}.py"
    if folder.absolute() in map(Path, (os.getcwd(), *sys.path)) and _stands_for_another(arguments.name):
        raise Usage(f"to={options.to}: {path.name} there would be taken for Python's {arguments.name}; name a folder")
    if folder.exists() and not folder.is_dir():
        raise Usage(f"to={options.to}: is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise Usage(f"{path} is there already; choose another name or folder") from None
    except OSError as error:
        raise Usage(f"to={options.to}: cannot write there ({error.strerror})") from None
    if any(path.parent.absolute().parent.samefile(root) for root in registry.roots()):
        target, step = arguments.name, f"{arguments.name}()"
    else:
        target = str(path) if path.is_absolute() else f"./{path}"
        reference = f"{target}:{class_name(arguments.name)}"
        step = f"{reference}()" if reference == shlex.quote(reference) else f"{reference!r}()"
    print(
        f"wrote {path}; go on with\n  effbench check {shlex.quote(target)}\n  effbench run recipe={shlex.quote(step)}"
    )
    return 0


def write_template(kind: str, name: str) -> str:
    """Source of a working method of `kind` that is called `name`. Raises `Usage` for a kind or name that cannot be."""
    kinds = {known.lower(): known for known in (*KINDS, "apply")}
    if kind.lower() not in kinds:
        raise Usage(f"unknown kind {kind!r}{nearest(kind, kinds.values())}")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,59}", name) or keyword.iskeyword(name):
        rule = "write small letters, digits and _, a letter first, at most 60 in all"
        raise Usage(f"{name[:60]!r} cannot name a method: {rule}")
    taken = {**registry.catalog(), **registry.presets()}
    if name in taken:
        raise Usage(f"{name!r} is taken by a method or preset of that name; see `effbench show {name}`")
    text = Path(templates.__path__[0], f"{kind.lower()}.py").read_text(encoding="utf-8")
    title = name.replace("_", " ").capitalize()
    return re.sub(rf"\bclass {EXAMPLE}\b", f"class {class_name(name)}", text).replace(
        f'"""{EXAMPLE}:', f'"""{title}:', 1
    )


def _stands_for_another(name: str) -> bool:
    """Whether a file of this name, in a folder that Python looks through, would hide a module."""
    found = None if name in sys.modules else importlib.util.find_spec(name)
    return name in sys.modules or found is not None


def class_name(name: str) -> str:
    """Name of the class that the file of a method has to define."""
    return "".join(word.capitalize() for word in name.split("_"))


COMMAND = Command(
    _new,
    "write the file of a new method that works, for an author to change",
    {"what": "method", "kind": f"{', '.join(KINDS)} or apply", "name": "of the method in recipes, such as my_method"},
    options=NewOptions,
)
