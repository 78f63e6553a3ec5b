"""A disk without space."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class FullDisk(Method):
    """For tests of the runner."""

    def apply(self, run: Run) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
