"""Files that a report writes to a folder of the user's, and never over anything else."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

from effbench.core.errors import Usage
from effbench.core.files import replace_file
from effbench.core.usage import check_writable

MARK = "effbench report"  # in each file: by it a later report knows what it may write over


def open_folder(folder: Path) -> None:
    """Raise `Usage` unless files can be written to the folder, which need not be there yet."""
    if folder.exists() and not folder.is_dir():
        raise Usage(f"to={folder}: is a file; name a folder")
    check_writable("to", folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that holds the mark. Raises `Usage` where another file has the name, or the disk is full."""
    try:
        if path.exists() and MARK.encode() not in path.read_bytes():
            raise Usage(f"to={path.parent}: {path.name} is there and is no report; choose another folder")
        replace_file(path, content)
    except OSError as error:
        raise Usage(f"to={path.parent}: cannot write {path.name} ({error.strerror})") from None


def name_file(title: str, style: str) -> str:
    """A name for the file of a table or a suite."""
    return f"{re.sub(r'[^a-z0-9]+', '-', title.casefold()).strip('-')[:120] or 'report'}.{style}"


def need(module: str, what: str) -> ModuleType:
    """A package that reports need and effbench does not. Raises `Usage` where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise Usage(f"{what} needs {package}: pip install 'effbench[report]', or {package} alone") from None
