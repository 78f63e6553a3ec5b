"""Full fine-tuning: AdamW on whatever the steps before it left trainable (Loshchilov & Hutter, 2019)."""

from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run
from effbench.nn.train.fit import FitSettings, fit


@dataclass(frozen=True)
class Fit(FitSettings, Method):
    """Uses the train plan up: what stands before it prepares, what stands after acts on the trained weights."""

    paper = "arXiv:1711.05101"
    published = "fit(weight_decay=0.01)"
    type = "fine-tuning"
    weight_update = "training"
    consumes = True
    trials = ({"steps": 2, "max_length": 32},)

    def check(self) -> None:
        self.require(self.steps > 0, "steps must be at least 1")
        self.require(not self.find_fault(), self.find_fault())
        self.require(self.batch_size > 0, "batch_size must be at least 1")
        self.require(0 <= self.warmup < 1, "warmup is a fraction of the steps, in [0, 1)")
        self.require(self.clip is None or self.clip > 0, "clip must be above 0, or None")
        self.require(self.weight_decay >= 0, "weight_decay must not be negative")
        self.require(self.max_length > 1, "max_length must be at least 2")

    def apply(self, run: Run) -> None:
        fit(run, self)
