"""A process that ends without a word."""

from __future__ import annotations

import os
from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class Vanishes(Method):
    """For tests of the runner."""

    def apply(self, run: Run) -> None:
        os._exit(3)
