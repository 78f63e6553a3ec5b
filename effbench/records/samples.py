"""Per-item results as columns: what several metrics share, such as the log-likelihoods of texts, is held once.

A record that is only run keeps them, with the log of its layers, in one compressed file named by its digest:
`samples/<suite>/v<version>/<digest>.json.gz`. It is written before the record that refers to it, so several runs
cannot mix theirs up.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from effbench.core.plain import plain
from effbench.records import files
from effbench.records.record import Unreadable

WIDEST = 10  # items that are longer lists are one column of lists


Place = tuple[str, int | None]  # name of samples, and where each item is a list, the place in it


class Column(msgspec.Struct):
    """One value per item, with all places that have these values."""

    places: list[Place]
    values: list[Any]


class Samples(msgspec.Struct, forbid_unknown_fields=True):
    """What is known of a record item by item and layer by layer."""

    columns: list[Column] = []
    layers: dict[str, Any] = {}


def columns(samples: Mapping[str, list[Any]]) -> list[Column]:
    """Plain samples, by name, as columns of which no two have the same values."""
    by_content: dict[bytes, Column] = {}
    for name, items in sorted(samples.items()):
        width = _width(items)
        parts: dict[int | None, list[Any]] = {k: [item[k] for item in items] for k in range(width)} or {None: items}
        for index, values in parts.items():
            column = by_content.setdefault(files.canonical(values), Column([], values))
            column.places.append((name, index))
    return list(by_content.values())


def from_columns(all_columns: list[Column]) -> dict[str, list[Any]]:
    """Samples by name. Raises `Unreadable` where columns of one name do not fit together."""
    parts: dict[str, dict[int | None, list[Any]]] = {}
    for column in all_columns:
        for name, index in column.places:
            parts.setdefault(name, {})[index] = column.values
    samples: dict[str, list[Any]] = {}
    for name, by_index in parts.items():
        try:
            if by_index.keys() == {None}:
                samples[name] = by_index[None]
            else:
                in_order = [by_index[k] for k in range(len(by_index))]
                samples[name] = [list(item) for item in zip(*in_order, strict=True)]
        except (KeyError, ValueError):
            raise Unreadable(f"the columns of {name} do not fit together") from None
    return samples


def add_samples(folder: Path, samples: Mapping[str, Any], layers: Mapping[str, Any]) -> str:
    """Write plain per-item results and the log of layers; returns the digest they are found by. Raises `OSError`."""
    content = msgspec.json.encode(Samples(columns(samples), dict(layers)))
    name = files.digest(content)
    files.add(samples_file(folder, name), gzip.compress(content, mtime=0))
    return name


def read_samples(folder: Path, name: str) -> Samples:
    """Per-item results and the log of layers by their digest. Raises `Unreadable`."""
    path = samples_file(folder, name)
    try:
        content = gzip.decompress(path.read_bytes())
        if files.digest(content) != name:
            raise Unreadable("its content is not what its name says")
        return msgspec.json.decode(content, type=Samples)
    except FileNotFoundError:
        raise Unreadable("missing") from None
    except OSError as error:  # gzip's own errors are among these
        raise Unreadable(f"cannot be read ({error.strerror or error})") from None
    except (EOFError, zlib.error, msgspec.MsgspecError, RecursionError) as error:
        raise Unreadable(f"not a file of samples ({error})") from None


def samples_file(folder: Path, name: str) -> Path:
    """Where the samples of one digest lie."""
    return folder / f"{name}.json.gz"


def split_layers(log: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A log without its layers, and the layers if there are any."""
    layers = log.get("layers")
    if not isinstance(layers, Mapping) or not layers:
        return dict(log), {}
    return {name: value for name, value in log.items() if name != "layers"}, plain(layers)


def _width(items: list[Any]) -> int:
    """Length of all items where they are lists of one length, else 0."""
    if not items or not all(isinstance(item, list) for item in items):
        return 0
    width = len(items[0])
    return width if 0 < width <= WIDEST and all(len(item) == width for item in items) else 0
