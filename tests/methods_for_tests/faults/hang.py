"""A process that never ends, and has a child that never ends."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class Hang(Method):
    """For tests of the runner."""

    def apply(self, run: Run) -> None:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        time.sleep(1000)
