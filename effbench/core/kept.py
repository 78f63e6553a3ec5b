"""Plain values that follow from files, kept between processes for as long as none of these changes."""

from __future__ import annotations

import contextlib
import hashlib
import marshal
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from effbench.core.paths import cache_folder

DIGEST = 32  # bytes in front


def recall(name: str, sources: Iterable[Path]) -> Any:
    """What was kept under a name; None where that is nothing, or one of the `sources` or of the files that it was kept
    with is not what it was."""
    try:
        data = (cache_folder() / name).read_bytes()
        if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:  # cut off, or not written here
            return None
        told, listed, states, value = marshal.loads(data[DIGEST:])
        same = told == sys.version and listed == [str(path) for path in sources]
        return value if same and states == _look(states) else None
    except (OSError, ValueError, EOFError, TypeError):
        return None


def keep(name: str, sources: Iterable[Path], files: Iterable[Path], value: Any) -> None:
    """Keep a plain value that follows from these files, and from which `sources` there are; where that cannot be
    written it is not kept."""
    with contextlib.suppress(OSError, ValueError):
        place, listed = cache_folder(), [str(path) for path in sources]
        body = marshal.dumps((sys.version, listed, _look(map(str, files)), value))
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place, delete=False) as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(file.name, place / name)


def _look(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Size and time of change of files."""
    states = {path: os.stat(path) for path in paths}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in states.items()}
