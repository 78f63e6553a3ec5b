"""Writing files that are whole or absent, whoever else writes, and naming content by its digest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

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
            path.parent.mkdir(parents=True, exist_ok=True)
            with _temporary(path.parent, content) as temporary:
                os.link(temporary, path)  # fails where a rename would overwrite
                _sync(path.parent)
            return True
        except FileExistsError:
            if path.parent.is_dir():
                return False
            raise
        except FileNotFoundError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def replace(path: Path, content: bytes) -> None:
    """Write a file, in place of one that is there. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path.parent, content) as temporary:
        os.replace(temporary, path)
        _sync(path.parent)


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


@contextlib.contextmanager
def _temporary(folder: Path, content: bytes) -> Iterator[Path]:
    """A file in `folder` with `content` safely on disk; removed on exit, if it is still there."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files private; records are for everyone
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _sync(folder: Path) -> None:
    """Make a new directory entry survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
