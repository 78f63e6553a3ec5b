"""Full fine-tuning: AdamW on whatever the steps before it left trainable (Loshchilov & Hutter, 2019)."""

from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run
from effbench.nn.train.fit import fit
from effbench.nn.train.settings import FitSettings


@dataclass(frozen=True)
class Fit(FitSettings, Method):
    """Uses the train plan up: what stands before it prepares, what stands after acts on the trained weights."""

    paper = "arXiv:1711.05101"
    published = "fit(weight_decay=0.01)"
    type = "fine-tuning"
    weight_update = "training"
    consumes = True
    tuned = {"lr": (3e-5, 1e-4, 3e-4, 1e-3)}
    trials = ({"steps": 2, "max_length": 32},)

    def check(self) -> None:
        self.require(not self.find_fault(), self.find_fault())

    def slots(self) -> tuple[str, ...]:
        return super().slots() + (("train.sampler",) if self.layout == "by_length" else ())

    def apply(self, run: Run) -> None:
        fit(run, self)
