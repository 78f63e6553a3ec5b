"""Writing files that are whole or absent, whoever else writes, and naming content by its digest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from effbench.core.files import create_file

ATTEMPTS = 10  # at a folder that others remove while it is written to


def canonical(content: Any) -> bytes:
    """The one JSON text of plain content."""
    return msgspec.json.encode(content, order="deterministic")


def digest(content: bytes, digits: int = 16) -> str:
    """Hex digest that content is found by."""
    return hashlib.sha256(content).hexdigest()[:digits]


def add(path: Path, content: bytes) -> bool:
    """Write a file unless it is there; whether it was not. Raises `OSError`."""
    for attempt in range(ATTEMPTS):
        try:
            create_file(path, content)
            return True
        except FileExistsError:
            return False
        except FileNotFoundError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that ask for it in the same way."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
