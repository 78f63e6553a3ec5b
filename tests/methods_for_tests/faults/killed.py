"""What the system does to a process when memory runs out."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class Killed(Method):
    """For tests of the runner."""

    def apply(self, run: Run) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
