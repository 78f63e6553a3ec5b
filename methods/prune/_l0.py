"""Hard-concrete gates: masks whose expected number of non-zeros has a gradient (Louizos et al., 2018).

The names in the formulas are those of arXiv:1712.01312, "The hard concrete distribution".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effbench.methods.prune._common import keep_mask
from effbench.methods.prune._training import TrainedMask

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1  # temperature and ends of the stretched interval, the paper's beta, gamma, zeta
OPEN = math.log(0.9 / 0.1)  # log alpha at the start: a dropout rate of one tenth


class HardConcreteMask(TrainedMask):
    """Gates z = clip(s (zeta - gamma) + gamma, 0, 1), s = sigmoid((logit u + log alpha) / beta), u uniform."""

    def __init__(self, linear: nn.Module, path: str, seed: int) -> None:
        super().__init__(linear, path, seed)
        noise = torch.randn(self.weight.shape, generator=self.generator("start"), device=self.weight.device)
        self.log_alpha = nn.Parameter(OPEN + 0.01 * noise)
        self.chosen = torch.ones_like(noise, dtype=torch.bool)  # False where `close` closes a gate for good

    def gate(self) -> Tensor:
        uniform = torch.rand(self.log_alpha.shape, generator=self.generator("gate"), device=self.log_alpha.device)
        noise = uniform.clamp(1e-6, 1 - 1e-6).logit()  # log u - log(1 - u): the binary concrete distribution
        return stretch(((noise + self.log_alpha) / BETA).sigmoid())

    def open(self) -> Tensor:
        """[out, in]: probability that a gate is not 0; a weight that an earlier step pruned does not count."""
        # The probability that the stretched variable exceeds 0: sigmoid(log alpha - beta log(-gamma / zeta)). The
        # paper's penalty is its sum over all gates.
        probability = (self.log_alpha - BETA * math.log(-LOW / HIGH)).sigmoid()
        return probability if self.held is None else probability * self.held

    def standing(self) -> Tensor:
        """[out, in]: log alpha, or minus infinity where an earlier step put a zero."""
        alpha = self.log_alpha.detach()
        return alpha if self.held is None else alpha.masked_fill(~self.held, -torch.inf)

    def result(self) -> tuple[Tensor, Tensor]:
        gate = stretch(self.log_alpha.detach().sigmoid())  # the test-time gate: without noise and temperature
        return self.weight * gate.to(self.weight.dtype), self.chosen & (gate > 0)


def stretch(concrete: Tensor) -> Tensor:
    """A gate in [0, 1] from its concrete variable in (0, 1): stretched to (gamma, zeta), then clipped."""
    return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)


def density(masks: Sequence[HardConcreteMask]) -> Tensor:
    """Expected fraction of non-zero weights in all linears together."""
    return torch.stack([mask.open().sum() for mask in masks]).sum() / sum(mask.log_alpha.numel() for mask in masks)


def close(masks: Sequence[HardConcreteMask], sparsity: float) -> None:
    """Have the smallest log alpha of all linears together closed, so that at least `sparsity` is met."""
    keep = keep_mask(torch.cat([mask.standing().flatten() for mask in masks])[None], sparsity)[0]
    for mask, part in zip(masks, keep.split([mask.log_alpha.numel() for mask in masks]), strict=True):
        mask.chosen = part.view_as(mask.log_alpha)
