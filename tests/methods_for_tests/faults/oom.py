"""No memory left."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class OOM(Method):
    """For tests of the runner."""

    def apply(self, run: Run) -> None:
        raise MemoryError("tried to allocate 2.00 GiB")
