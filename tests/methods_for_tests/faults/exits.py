"""A library that ends the program."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class Exits(Method):
    """For tests of the runner."""

    def apply(self, run: Run) -> None:
        sys.exit(3)
