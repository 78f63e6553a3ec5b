"""What the file of an adapter says of the model that it was trained on, and whether that is the one it is put on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from effbench.core.errors import Refused
from effbench.nn.model.beside import Beside
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import Replaced

SIZES = {"in_features", "out_features", "bias", "masked", "outliers"}  # what differs from linear to linear


class Base(msgspec.Struct, forbid_unknown_fields=True):
    """A model by its name, and the formats of its quantized linears."""

    name: str = ""  # a folder, or org/name on the Hub; empty: it was built from a configuration
    quantized: list[str] = []  # each format once, with its settings


def describe_base(model: Any) -> Base:
    """The model without what stands beside its linears."""
    found = set()
    for _, module in Blocks(model).linears():
        inner: Any = module
        while isinstance(inner, Beside):
            inner = inner.base
        if isinstance(inner, Replaced) and _has_codes(inner):
            settings = ", ".join(f"{key}={value}" for key, value in inner.config().items() if key not in SIZES)
            found.add(f"{type(inner).__name__}({settings})")
    return Base(str(getattr(model.config, "name_or_path", None) or ""), sorted(found))


def check_base(model: Any, said: Base | None, where: str) -> None:
    """Raise `Refused` where an adapter was trained on another model, or on one that was quantized in another way.

    Names tell models apart where both are those of the Hub: a folder may lie anywhere.
    """
    if said is None:
        return
    here = describe_base(model)
    if said.name != here.name and _is_hub(said.name) and _is_hub(here.name):
        raise Refused(f"{where}: was trained on {said.name}, and this is {here.name}: put it on the model it is for")
    if said.quantized != here.quantized:
        before, now = (" and ".join(base.quantized) or "dense linears" for base in (said, here))
        raise Refused(f"{where}: was trained beside {before}, and here are {now}: quantize the model as it was then")


def _has_codes(module: Replaced) -> bool:
    """Whether its weights are codes, and not numbers of 16 bits or more, dense or sparse."""
    weight = getattr(module, "weight", None)
    return weight is not None and not (weight.is_floating_point() and weight.dtype.itemsize > 1)


def _is_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).exists()
