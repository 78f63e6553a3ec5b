"""Adapters by name: what steps of one name have trained, of which one counts at a time.

Modules that belong to an adapter carry its name in `adapter`; those without one always count. Choosing one changes
neither tensors nor what is trainable.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from effbench.core.errors import Refused, Usage
from effbench.core.usage import nearest
from effbench.nn.model.linear import Around, find_inner

if TYPE_CHECKING:
    from effbench.core.run import Run

NAME = re.compile(r"[\w-]*", re.ASCII)  # names are parts of paths in the model, which dots divide
NAMED = "adapter is a name of letters, digits, _ and -"


def is_name(text: str) -> bool:
    """Whether an adapter can be called so; the empty name is that of what always counts."""
    return NAME.fullmatch(text) is not None


def join_name(stem: str, adapter: str) -> str:
    """What the child of a module is called that belongs to an adapter, or to none."""
    return "_".join(filter(None, (stem, adapter)))


def add_part(parent: nn.Module, stem: str, part: Any) -> None:
    """Put a part of an adapter into a module, inside of what stands round it. Raises `Refused` where one of that name
    is there."""
    parent = find_inner(parent)
    name = join_name(stem, part.adapter)
    if name in dict(parent.named_children()):
        raise Refused(f"there is a {name} already: give another name with adapter=")
    parent.add_module(name, part)


def check_once(module: nn.Module, kind: type[Around], adapter: str) -> None:
    """Raise `Refused` where one of the kind that belongs to an adapter of that name stands round the module already."""
    while isinstance(module, Around):
        if adapter and type(module) is kind and module.adapter == adapter:
            raise Refused(f"there is a {kind.__name__} of adapter {adapter!r} already: give another name with adapter=")
        module = module.inner


@contextlib.contextmanager
def adding(run: Run) -> Iterator[None]:
    """Freeze what there is, but for what earlier steps have put in place for the same fit; what is put in place inside
    is trained with it."""
    before = set(run.model.parameters())
    for parameter in before - run.waiting:
        parameter.requires_grad_(False)
    yield
    run.waiting |= {parameter for parameter in run.model.parameters() if parameter.requires_grad} - before


def find_parts(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Any]]:
    """Modules of the adapter of that name, or of all adapters, with their paths."""
    for path, module in model.named_modules():
        own = getattr(module, "adapter", "")
        if isinstance(own, str) and own and name in (None, own):
            yield path, module


def list_adapters(model: nn.Module) -> list[str]:
    """Names of all adapters, in the order they stand in the model."""
    return list(dict.fromkeys(part.adapter for _, part in find_parts(model)))


def choose_adapter(model: nn.Module, name: str | None) -> None:
    """Have the adapter of that name count alone; None: none of them. Raises `Usage` for one that is not there."""
    known = list_adapters(model)
    if name is not None and name not in known:
        raise Usage(f"no adapter is called {name!r}{nearest(name, known)}")
    for _, part in find_parts(model):
        part.active = part.adapter == name
