"""An exception that nobody expected."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class Crash(Method):
    """For tests of the runner."""

    def apply(self, run: Run) -> None:
        raise ValueError("a bug")
