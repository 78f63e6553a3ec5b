"""Where effbench keeps what is not code."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
SUITES = PACKAGE / "suites"
