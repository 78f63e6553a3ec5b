"""LoRA+: the factor on the side of the outputs is trained at a higher rate than the other (Hayou et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from effbench.core.kinds import Train
from effbench.core.run import Run


@dataclass(frozen=True)
class LoRAPlus(Train):
    """The rate of B is `ratio` times that of A, which is the fit's.

    As in the authors' code vectors (biases, magnitudes) are trained like B, and tables of embeddings at a rate of
    their own. Weight decay is that of the fit for both factors, and none for vectors.
    """

    paper = "arXiv:2402.12354"
    caveats = ("the ratio is best tuned together with the rate, which is to be lower than LoRA's",)
    type = "optimizer"
    weight_update = "low rank"
    follows = "a low-rank step"
    tuned = {"ratio": (4.0, 16.0)}

    ratio: float = 16.0  # learning rate of B over that of A
    embedding_lr: float = 1e-6  # of trained tables of embeddings

    def check(self) -> None:
        self.require(self.ratio >= 1, "ratio must be at least 1")
        self.require(self.embedding_lr > 0, "embedding_lr must be above 0")

    def param_groups(self, groups: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
        fast, tables = set(), set()
        for module in run.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Embedding):
                    tables.add(parameter)
                elif parameter.ndim == 1 or name in getattr(module, "output_factors", ()):
                    fast.add(parameter)
        arranged = []
        for group in groups:
            rest = [parameter for parameter in group["params"] if parameter not in fast | tables]
            arranged.append(group | {"params": rest})
            quick = [parameter for parameter in group["params"] if parameter in fast]
            arranged.append(group | {"params": quick, "lr": self.ratio * group["lr"]})
            slow = [parameter for parameter in group["params"] if parameter in tables]
            arranged.append(group | {"params": slow, "lr": self.embedding_lr})
        return arranged
