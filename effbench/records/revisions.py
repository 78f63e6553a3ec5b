"""Results as they were at a git revision, without touching the work tree."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from effbench.core.errors import Usage, first_line

SEPARATOR = ":"  # between a revision and a folder, as git has it


def find_commit(name: str, near: Path) -> str | None:
    """The commit that a name means in the repository around a folder; None where it means none."""
    revision = name.partition(SEPARATOR)[0]
    if not revision or revision.startswith("-") or not revision.isprintable():
        return None
    try:
        done = _git(near, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except OSError:  # git is not installed, or there is no such folder
        return None
    return done.stdout.decode().strip() if done.returncode == 0 else None


@contextlib.contextmanager
def open_revision(commit: str, folder: Path) -> Iterator[Path]:
    """A copy of a folder of a repository as it was at a commit, for as long as the context lasts.

    `folder` need not exist now. Raises `Usage` where it did not exist then, or lies in no repository.
    """
    near = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        top = Path(_git(near, "rev-parse", "--show-toplevel").stdout.decode().strip()).resolve()
        place = folder.relative_to(top).as_posix()
    except ValueError:
        raise Usage(f"{folder}: is in no git repository whose history could be read") from None
    done = _git(top, "archive", "--format=tar", commit, *([] if place == "." else ["--", place]))
    if done.returncode:
        why = first_line(Exception(done.stderr.decode(errors="replace").strip()))
        raise Usage(f"{place}: cannot be read at {commit[:9]} ({why})")
    with tempfile.TemporaryDirectory(prefix="effbench-") as copy:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(copy, filter="data")
        yield Path(copy, place)


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False)
