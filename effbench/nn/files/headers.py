"""Headers of safetensors and GGUF files: what they say of their tensors, held against the length of the file.

Weights are never read. The reader of the package gguf takes seconds for a vocabulary, and does not see that a file was
cut off.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from effbench.core.errors import Unsupported, first_line

POINTER = b"version https://git-lfs"  # how a file begins that stands for one that Git LFS keeps
MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {
    10: "Q",
    11: "q",
    12: "d",
}  # kinds of GGUF values
TEXT, ARRAY = 8, 9
AGAIN = "copy or download it again"


class Header(NamedTuple):
    """What a file says of one tensor."""

    dtype: str  # as the file names it: BF16, F32, Q4_1
    shape: tuple[int, ...]


class GgufHeader(NamedTuple):
    """All that a GGUF file holds besides weights."""

    metadata: dict[str, Any]
    tensors: dict[str, Header]  # shapes as torch has them, the longest stride first


def read_safetensors(path: Path) -> dict[str, Header]:
    """Headers of the tensors of a file, by name. Raises `Unsupported` for a file that is none or not whole."""
    _find_length(path)
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Header(part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    except Exception as error:  # whatever safetensors raises on damaged files
        raise Unsupported(f"{path.name}: is no whole safetensors file ({first_line(error)}): {AGAIN}") from None


def read_gguf(path: Path) -> GgufHeader:
    """The metadata and the tensors of a GGUF file. Raises `Unsupported` for a file that is none or not whole."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    length = _find_length(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != MAGIC:
            raise Unsupported(f"{path.name}: is not a GGUF file")
        try:
            cursor = _Cursor(data)
            version, tensors, pairs = cursor.take("I"), 0, 0
            if version in VERSIONS:
                tensors, pairs = cursor.take("Q"), cursor.take("Q")
            metadata = {cursor.take_text(): cursor.take_value(cursor.take("I")) for _ in range(pairs)}
            entries = {}
            for _ in range(tensors):
                name = cursor.take_text()
                shape = tuple(cursor.take("Q") for _ in range(cursor.take("I")))
                entries[name] = shape, cursor.take("I"), cursor.take("Q")
        except struct.error:
            raise Unsupported(f"{path.name}: was cut off in its header, at byte {length}: {AGAIN}") from None
        except (ValueError, RecursionError) as error:
            raise Unsupported(f"{path.name}: its header cannot be read: {first_line(error)}") from None
    if version not in VERSIONS:
        raise Unsupported(f"{path.name}: is GGUF version {version}, known are {' and '.join(map(str, VERSIONS))}")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise Unsupported(f"{path.name}: general.alignment is {alignment!r}, must be a whole number from 1 up")
    start = -(-cursor.at // alignment) * alignment
    headers: dict[str, Header] = {}
    for name, (shape, kind, offset) in entries.items():
        if kind not in iter(GGMLQuantizationType):
            raise Unsupported(f"{path.name}: {name} is stored as type {kind}, which the package gguf does not know")
        weights, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        end = start + offset + math.prod(shape) // weights * size
        if end > length:
            raise Unsupported(f"{path.name}: was cut off at byte {length}, {name} ends at {end}: {AGAIN}")
        headers[name] = Header(GGMLQuantizationType(kind).name, shape[::-1])
    return GgufHeader(metadata, headers)


class _Cursor:
    """Reads values of a GGUF header one after the other. Raises `struct.error` at the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = len(MAGIC)

    def take(self, kind: str) -> Any:
        """One number, by its letter in `struct`."""
        return self._take_many(1, kind)[0]

    def take_text(self) -> str:
        size = self.take("Q")
        self._check(size)
        self.at += size
        return self._data[self.at - size : self.at].decode()

    def take_value(self, kind: int) -> Any:
        """One value of metadata: a number, a text or a list. Raises `ValueError` for a kind that is none."""
        if kind == TEXT:
            return self.take_text()
        if kind == ARRAY:
            kind, count = self.take("I"), self.take("Q")
            if kind in NUMBERS:
                return self._take_many(count, NUMBERS[kind])
            return [self.take_value(kind) for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"it holds a value of kind {kind}")
        return self.take(NUMBERS[kind])

    def _take_many(self, count: int, kind: str) -> list[Any]:
        size = count * struct.calcsize(f"<{kind}")
        self._check(size)
        self.at += size
        return list(struct.unpack_from(f"<{count}{kind}", self._data, self.at - size))

    def _check(self, size: int) -> None:
        if self.at + size > len(self._data):
            raise struct.error("the file ends here")


def _find_length(path: Path) -> int:
    """Bytes of a file. Raises `Unsupported` for one that cannot be read, is empty, or stands for another."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(POINTER))
        length = path.stat().st_size
    except OSError as error:
        raise Unsupported(f"{path.name}: cannot be read ({error.strerror})") from None
    if not begin:
        raise Unsupported(f"{path.name}: is empty: {AGAIN}")
    if begin == POINTER:
        raise Unsupported(f"{path.name}: is a pointer of Git LFS and not the file: `git lfs pull` brings it")
    return length
