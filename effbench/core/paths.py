"""Where effbench keeps what is not code."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
SUITES = PACKAGE / "suites"
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None  # None for an installed package
RUNS = "runs"  # folder of own records, below the working folder
PUBLISHED = CHECKOUT / "results" if CHECKOUT is not None else None  # records and tables that came with the source


def cache_folder() -> Path:
    """Where files are kept from one run to the next: `EFFBENCH_CACHE`, else `~/.cache/effbench`."""
    return Path(os.environ.get("EFFBENCH_CACHE") or "~/.cache/effbench").expanduser()
