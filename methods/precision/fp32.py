"""Single precision throughout, TF32 off: what other precisions are compared with (IEEE 754 binary32)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.methods.precision._multiply import multiplying
from effbench.nn.train.slots import Precision


@dataclass(frozen=True)
class FP32(Train, Precision):
    """Everything is computed and kept in float32, frozen parts of a 16-bit model too, and products round nothing."""

    paper = "IEEE 754-2019"
    published = "fp32(), fit()"
    type = "training precision"
    weight_update = "training"
    claims = ("train.precision",)
    identity = {}  # on a processor, of a model that is float32
    exceptions = {"check_two_steps_of_fit": "on a processor a float32 model is trained so anyway"}

    def context(self, run: Run) -> AbstractContextManager[None]:
        return multiplying(run, "highest")
