"""GMP: prune the smallest weights more and more while training goes on (Zhu & Gupta, 2017)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.formats.sparse import Pattern
from effbench.methods.prune._common import check_pattern, keep_mask
from effbench.methods.prune._training import TrainedMask, find_masks, mask_linears


class MagnitudeMask(TrainedMask):
    """Keeps the largest weights. Masked weights get no gradient, but they keep their values and may return."""

    mask: Tensor

    def __init__(self, linear: nn.Module, path: str, seed: int, pattern: str) -> None:
        super().__init__(linear, path, seed)
        self.pattern = pattern
        self.register_buffer("mask", self.choose(0.0))

    def choose(self, sparsity: float) -> Tensor:
        """Bool [out, in]: all but the smallest weights, by magnitude in float32."""
        return keep_mask(self.rank_pruned_last(self.weight.detach().float().abs()), sparsity, self.pattern)

    def gate(self) -> Tensor:
        return self.mask

    def result(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.mask


@dataclass(frozen=True)
class GMP(Train):
    """The sparsity rises fast at first and slowly at the end; the masks are chosen anew at every rise.

    By default the first tenth of the fit is dense and the last fifth recovers under fixed masks: the share that
    the code of arXiv:2005.07683 gives magnitude pruning when it fine-tunes language models.
    """

    paper = "arXiv:1710.01878"
    caveats = ("a fit of a trained model; Zhu & Gupta prune during the whole training, over epochs",)
    type = "sparse training"
    sparsifies = True
    settles = True
    trials = ({}, {"pattern": "2:4"}, {"pattern": "block:16x16"})

    sparsity: float = 0.5  # at the end, of every matrix
    pattern: str = "unstructured"  # or "n:m", "block:RxC"
    every: int = 10  # optimizer steps between updates of the masks
    initial: float = 0.0  # sparsity of the first update
    begin: float = 0.1  # fraction of the fit at which pruning begins
    end: float = 0.8  # fraction of the fit at which the masks are fixed

    def check(self) -> None:
        check_pattern(self, self.sparsity, self.pattern)
        self.require(self.every > 0, "every must be at least 1")
        self.require(0 <= self.initial <= self.sparsity, "initial must be in [0, sparsity]")
        self.require(0 <= self.begin <= self.end <= 1, "begin and end are fractions of the fit, begin first")

    def check_shape(self, out: int, width: int) -> None:
        Pattern.of(self.pattern).check_shape(out, width)

    def update(self, done: int, total: int) -> float | None:
        """Sparsity of the update after `done` of `total` steps; None when there is no update.

        The paper's cubic schedule: s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 at t = t0, t0 + dt, ..., t0 + n dt.
        """
        first = max(1, round(self.begin * total))
        last = max(first, round(self.end * total))
        interval = max(1, min(self.every, last - first))
        updates = (last - first) // interval
        index, between = divmod(done - first, interval)
        if between or not 0 <= index <= updates:
            return None
        left = 1 - index / updates if updates else 0.0
        return self.sparsity + (self.initial - self.sparsity) * left**3

    def context(self, run: Run) -> AbstractContextManager[Any]:
        return mask_linears(run, partial(MagnitudeMask, pattern=self.pattern), self.pattern)

    def on_step(self, run: Run) -> None:
        assert run.step is not None
        sparsity = self.update(run.step.index + 1, run.step.total)
        if sparsity is not None:
            for module in find_masks(run, MagnitudeMask):
                module.mask = module.choose(sparsity)
