"""A process of several is killed while they train."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from torch import distributed

from effbench.core.kinds import Train
from effbench.core.run import Run


@dataclass(frozen=True)
class RankKilled(Train):
    """For tests of cells of several ranks."""

    rank: int = 1

    def on_step(self, run: Run) -> None:
        assert run.step is not None
        if run.step.index == 1 and distributed.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
