"""Products of float32 numbers that are rounded to 10 bits of mantissa, sums in float32 (NVIDIA Ampere's TF32)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.methods.precision._multiply import multiplying
from effbench.nn.train.slots import Precision

APPLYING = (
    *("deterministic", "touches_only_its_part", "two_steps_of_fit", "learns", "computes_with_its_weights"),
    *("hooks_arrive", "trained_survives", "resume", "save_and_load", "linear_protocol", "undone_on_exit"),
    *("writes_its_slots", "odd_shapes"),
)  # what is checked of a method by applying it, which a processor ends


@dataclass(frozen=True)
class TF32(Train, Precision):
    """Everything is kept in float32; only what matrix units multiply has 19 bits."""

    paper = "NVIDIA A100 Tensor Core GPU Architecture, 2020"
    published = "tf32(), fit()"
    type = "training precision"
    weight_update = "training"
    claims = ("train.precision",)
    exceptions = dict.fromkeys([f"check_{name}" for name in APPLYING], "the checks run on a processor")

    def apply(self, run: Run) -> None:
        capable = run.device.type == "cuda" and torch.cuda.get_device_capability(run.device) >= (8, 0)
        if not capable:
            raise Unsupported(f"{run.device.type} has no TF32: it came with NVIDIA's Ampere; use fp32() or bf16()")
        super().apply(run)

    def context(self, run: Run) -> AbstractContextManager[None]:
        return multiplying(run, "high")
