"""Depends on a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effbench.core.kinds import Weights


@dataclass(frozen=True)
class ReadsFile(Weights):
    """For tests of identities."""

    path: str = ""

    def files(self) -> tuple[Path, ...]:
        return (Path(self.path),)
