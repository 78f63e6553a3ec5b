"""Movement pruning: keep the weights that training moves away from zero (Sanh et al., 2020)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.formats.sparse import Pattern
from effbench.methods.prune._common import check_pattern, keep_mask
from effbench.methods.prune._training import TrainedMask, find_masks, freeze, mask_linears, split_group


class ScoredMask(TrainedMask):
    """Keeps the weights with the largest scores S, which are trained through the mask as if it were S itself.

    So dL/dS = dL/dW' * W for masked weights too, and under plain SGD S = -lr * sum of W * dL/dW'.
    """

    mask: Tensor

    def __init__(self, linear: nn.Module, path: str, seed: int, pattern: str) -> None:
        super().__init__(linear, path, seed)
        self.pattern = pattern
        self.score = nn.Parameter(torch.zeros(self.weight.shape, device=self.weight.device))
        self.register_buffer("mask", self.choose(0.0))

    def choose(self, sparsity: float) -> Tensor:
        """Bool [out, in]: all but the lowest scores."""
        return keep_mask(self.rank_pruned_last(self.score.detach()), sparsity, self.pattern)

    def gate(self) -> Tensor:
        # The straight-through estimator: the value is the mask, the gradient passes to the scores unchanged.
        return self.mask + (self.score - self.score.detach())

    def result(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.mask


@dataclass(frozen=True)
class Movement(Train):
    """Hard movement pruning: the mask is the top of the scores of each matrix, renewed at every step."""

    paper = "arXiv:2005.07683"
    # The authors' settings for SQuAD: 10 epochs of 88,000 examples.
    published = "movement(sparsity=0.85), fit(steps=55000, lr=3e-05, batch_size=16, schedule='linear', warmup=0.1)"
    caveats = ("scores need training: the paper gives them 10 epochs, 55,000 steps",)
    type = "sparse training"
    sparsifies = True
    settles = True
    trials = ({}, {"pattern": "2:4"})

    sparsity: float = 0.5  # at the end, of every matrix
    pattern: str = "unstructured"  # or "n:m", "block:RxC"
    lr: float = 1e-2  # of the scores, under the schedule of the fit; the weights have the rate of the fit
    begin: float = 0.1  # fraction of the fit that is dense: 1 epoch of 10
    end: float = 0.8  # fraction of the fit at which the sparsity is reached: 2 epochs of 10 remain
    freeze_embeddings: bool = True  # as in the paper; a head tied to them is frozen too

    def check(self) -> None:
        check_pattern(self, self.sparsity, self.pattern)
        self.require(self.lr > 0, "lr must be above 0")
        self.require(0 <= self.begin <= self.end <= 1, "begin and end are fractions of the fit, begin first")

    def check_shape(self, out: int, width: int) -> None:
        Pattern.of(self.pattern).check_shape(out, width)

    def at(self, done: int, total: int) -> float:
        """Sparsity of the mask after `done` of `total` steps: 0, then the cubic rise of GMP, then `sparsity`."""
        first, last = self.begin * total, self.end * total
        if done > last or done == total:
            return self.sparsity
        if done <= first:
            return 0.0
        return self.sparsity * (1 - (1 - (done - first) / (last - first)) ** 3)

    @contextlib.contextmanager
    def context(self, run: Run) -> Iterator[Any]:
        embeddings = [module for module in run.model.modules() if isinstance(module, nn.Embedding)]
        still = [parameter for module in embeddings for parameter in module.parameters()]
        with (
            freeze(still if self.freeze_embeddings else []),
            mask_linears(run, partial(ScoredMask, pattern=self.pattern), self.pattern),
        ):
            yield

    def param_groups(self, groups: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
        scores = (module.score for module in find_masks(run, ScoredMask))
        return split_group(groups, scores, lr=self.lr, weight_decay=0.0)

    def on_step(self, run: Run) -> None:
        assert run.step is not None
        sparsity = self.at(run.step.index + 1, run.step.total)
        for module in find_masks(run, ScoredMask):
            module.mask = module.choose(sparsity)
