"""A kernel that spoils the context of its process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class Spoiled(Method):
    """For tests of the runner, on a GPU only: an assertion fails on the device, and nothing says so yet."""

    def apply(self, run: Run) -> None:
        table = torch.zeros(4, device=run.device)
        table[torch.full((1,), 9, device=run.device)] += 1
