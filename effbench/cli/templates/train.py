"""Example: gives vectors, which are norms and biases, a learning rate of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effbench.core.kinds import Train
from effbench.core.run import Run


@dataclass(frozen=True)
class Example(Train):
    """What a reader of the paper should know first."""

    paper = "unpublished"  # or "arXiv:NNNN.NNNNN", and then published = "example()" or caveats = ("what differs",)
    identity = {"factor": 1.0}  # settings at which the fit goes as it would without this method

    factor: float = 10.0  # learning rate of vectors, that of matrices being 1

    def check(self) -> None:
        self.require(self.factor >= 0, "factor must not be negative")

    def param_groups(self, groups: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
        """The optimizer's groups, each with its own learning rate; see `Method` for the other hooks of a fit."""
        parts = []
        for group in groups:
            vectors = [parameter for parameter in group["params"] if parameter.ndim < 2]
            matrices = [parameter for parameter in group["params"] if parameter.ndim >= 2]
            parts += [group | {"params": matrices}, group | {"params": vectors, "lr": self.factor * group["lr"]}]
        return [part for part in parts if part["params"]]
