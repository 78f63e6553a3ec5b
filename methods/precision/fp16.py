"""float16 arithmetic with float32 master weights, and a loss scaled as gradients allow (Micikevicius et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effbench import ops
from effbench.core.errors import Diverged
from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.nn.model.held import local
from effbench.nn.train.slots import Precision

if TYPE_CHECKING:
    from effbench.nn.train.batches import Batch

GROWTH, BACKOFF = 2.0, 0.5
FLOOR = 1.0  # a scale below it would shrink gradients, and what overflows there overflows by itself


@dataclass(frozen=True)
class FP16(Train):
    """Matrix products take and give float16; softmax, norms, the loss, gradients of weights and masters are float32.

    Gradients below 2^-24 would be zero in float16, so the loss is scaled before it is differentiated. A pass whose
    gradients overflow is given up, the scale halved, and the step is taken again.
    """

    paper = "arXiv:1710.03740"
    published = "fp16(), fit()"
    type = "training precision"
    weight_update = "training"
    claims = ("train.precision",)

    scale: float = 65536.0  # of the loss, at the start
    growth_every: int = 2000  # steps in a row without an overflow, after which the scale is doubled
    cap: float = 2.0**24  # that the scale does not grow beyond; one that begins above the default goes down alone

    def check(self) -> None:
        self.require(self.scale >= FLOOR, f"scale must be at least {FLOOR:g}")
        self.require(self.growth_every > 0, "growth_every must be at least 1")
        self.require(
            self.cap >= min(self.scale, type(self).cap),
            f"cap={self.cap:g} is below scale={self.scale:g} that it begins with: give a smaller scale, too",
        )

    def slot_values(self) -> dict[str, Any]:
        return {"precision": Scaling(self)}


class Scaling(Precision):
    """Section 3.2 of the paper; scale and count go as those of `torch.amp.GradScaler`, up to the cap."""

    def __init__(self, method: FP16) -> None:
        self.method = method

    def get_scale(self, run: Run) -> float:
        """What the loss is multiplied by now."""
        return float(run.state(self.method).setdefault("scale", self.method.scale))

    def forward(self, run: Run, batch: Batch | None = None) -> AbstractContextManager[Any]:
        return torch.autocast(run.device.type, torch.float16)

    def scale(self, loss: Tensor, run: Run) -> Tensor:
        return loss * self.get_scale(run)

    def unscale(self, parameters: Sequence[nn.Parameter], run: Run) -> bool:
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        return not gradients or bool(ops.load("unscale")(gradients, 1 / self.get_scale(run)))

    def settle(self, taken: bool, run: Run) -> None:
        scale, clean = self.get_scale(run), run.state(self.method).get("clean", 0) + 1
        if not taken:
            scale, clean = scale * BACKOFF, 0
            if scale < FLOOR:
                raise Diverged(f"gradients overflow in float16 at a loss scale of {scale / BACKOFF:g}: use bf16()")
        elif clean == self.method.growth_every:
            scale, clean = max(scale, min(scale * GROWTH, self.method.cap)), 0
        run.state(self.method).update(scale=scale, clean=clean)
        run.log.notes["loss_scale"] = scale
