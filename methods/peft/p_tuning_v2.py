"""P-Tuning v2: trainable prompts at every layer, as keys and values in front of it (Liu et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.methods.peft._prefix import Prefixes


@dataclass(frozen=True)
class PTuningV2(Prefixes):
    """Section 3.2: deep prompts are trained as they are; whether an MLP that makes them helps depends on the task."""

    paper = "arXiv:2110.07602"
    caveats = (
        "the paper classifies and tags by a head, with a number of prompts for each task",
        "the authors' code drops prompts out in training",
    )

    reparametrize: bool = False  # have an MLP of width `hidden` make them while they are trained

    @property
    def reparametrized(self) -> bool:
        return self.reparametrize
