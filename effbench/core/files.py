"""Files that appear whole or not at all, and their digests."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def create_file(path: Path, content: str | bytes) -> None:
    """Write a new file and its folders: whole and safely on disk, or not at all.

    Of several writers of one path the first succeeds. Raises `FileExistsError` for the others, with nothing changed,
    and `OSError` when the disk is full or the folder is not ours to write to.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file stands where the folder should be; says nothing of `path`
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from None
    with _temporary(path.parent, data) as temporary:
        os.link(temporary, path)  # fails where a rename would overwrite
        _sync_folder(path.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of one file, remembered while its size and time of change stay the same. Raises `OSError`."""
    status = path.stat()
    return _file_digest(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _file_digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file and its folders, whole, in place of one that may be there. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path.parent, content) as temporary:
        os.replace(temporary, path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def _temporary(folder: Path, content: bytes) -> Iterator[Path]:
    """A file in `folder` with `content` safely on disk; removed on exit, if it is still there."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files private; results are for everyone
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _sync_folder(folder: Path) -> None:
    """Make a new directory entry survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
