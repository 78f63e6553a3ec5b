"""Numbers that are no numbers."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.errors import Diverged
from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class Diverge(Method):
    """For tests of the runner."""

    def apply(self, run: Run) -> None:
        raise Diverged("the loss is nan")
