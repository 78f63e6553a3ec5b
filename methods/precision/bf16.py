"""bfloat16 arithmetic with float32 master weights and optimizer states (Kalamkar et al., 2019)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.nn.train.slots import Precision

if TYPE_CHECKING:
    from effbench.nn.train.batches import Batch


@dataclass(frozen=True)
class BF16(Train, Precision):
    """Matrix products take and give bfloat16, which has the range of float32: the loss needs no scale.

    Softmax, norms and the loss stay in float32. Weights are rounded anew in each forward pass.
    """

    paper = "arXiv:1905.12322"
    published = "bf16(), fit()"
    type = "training precision"
    weight_update = "training"
    claims = ("train.precision",)

    def forward(self, run: Run, batch: Batch | None = None) -> AbstractContextManager[Any]:
        return torch.autocast(run.device.type, torch.bfloat16)
