"""Example: multiplies the weights of every linear in the blocks by one factor."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run
from effbench.nn.model.linear import dense_weight, rebuilt, replace


@dataclass(frozen=True)
class Example(Method):
    """What a reader of the paper should know first."""

    paper = "unpublished"  # or "arXiv:NNNN.NNNNN", and then published = "example()" or caveats = ("what differs",)
    settles = True  # adapters that were trained before are merged before this step
    identity = {"factor": 1.0}  # settings at which the model stays what it is

    factor: float = 0.9  # of every weight

    def apply(self, run: Run) -> None:
        """Change the run: its model, its data or its plans."""
        for path, linear in run.linears().items():
            replace(run.model, path, rebuilt(linear, self.factor * dense_weight(linear)))
