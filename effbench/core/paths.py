"""Where effbench keeps what is not code."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
SUITES = PACKAGE / "suites"
CHECKOUT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else None  # None for an installed package
RUNS = "runs"  # folder of own records, below the working folder
PUBLISHED = CHECKOUT / "results" if CHECKOUT is not None else None  # records and tables that came with the source
