"""A process of several is killed while they train."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from torch import Tensor, distributed

from effbench.core.kinds import Train
from effbench.core.run import Run


@dataclass(frozen=True)
class RankKilled(Train):
    """For tests of cells of several ranks."""

    rank: int = 1

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        assert run.step is not None
        if run.step.index == 1 and distributed.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch
