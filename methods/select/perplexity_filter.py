"""Perplexity filter: by the perplexity under a model of curated text (CCNet, Wenzek et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.train.fit import fit
from effbench.nn.train.passes import score_losses
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.teacher import count_shared
from effbench.nn.train.windows import training_on

CURATED = "target"


@dataclass(frozen=True)
class PerplexityFilter(Select):
    """Examples within a band of the perplexities of the pool come first, then those outside, the farther the later.

    The model is trained on the curated slice, which is what the data names as target, or any other of the run.
    """

    paper = "arXiv:1911.00359"
    caveats = (
        "the paper's model is a 5-gram model of Wikipedia; here the model itself, trained a little on the target",
        "the paper cuts a language in thirds, head, middle and tail; the band is the head where it is not told",
    )
    type = "data selection"
    usual = 0.2
    trials = ({"steps": 2}, {"reference": "reference", "first": "median", "low": 5, "high": 95})

    reference: str = CURATED  # whose perplexity it is: target, for a copy of the model that is trained on that part;
    # or the role of a model: reference, model, or a name that a step before gave
    low: float = 0.0  # percentile of the pool where the band begins
    high: float = 100 / 3  # and where it ends
    first: Literal["least", "median"] = "least"  # in the band: the least perplexity, or the nearest to the median
    steps: int = 50  # that the copy is trained
    lr: float = 1e-3  # that it is trained with

    @property
    def needs_part(self) -> str | None:
        return CURATED if self.reference == CURATED else None

    def check(self) -> None:
        super().check()
        self.require(0 <= self.low < self.high <= 100, "low and high are percentiles, the one below the other")
        self.require(self.steps > 0 and self.lr > 0, "steps and lr must be above 0")

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        losses = self._measure(examples, run)  # logarithms of perplexities
        low, high = losses.quantile(torch.tensor([self.low / 100, self.high / 100]))
        outside = torch.maximum(low - losses, losses - high)
        order = (losses - losses.median()).abs() if self.first == "median" else losses
        # In the band counts the place in the order, which is below 1; beyond it only how far.
        inside = order.argsort(stable=True).argsort() / len(losses)
        return torch.where(outside > 0, -1 - outside, -inside)

    def _measure(self, examples: Sequence[Example], run: Run) -> Tensor:
        """[N] log-perplexities of the learned tokens. Raises `Usage`, `Unsupported` for a model of other tokens."""
        if self.reference != CURATED:
            model = run.role(self.reference)
            count_shared(run, self.reference)
            return score_losses(run, f"perplexity-{self.reference}", model, examples)
        curated = run.data.target
        self.require_part(bool(curated), run.data.name)
        with run.aside("perplexity"), training_on(run, curated):
            fit(run, FitSettings(steps=self.steps, lr=self.lr))
            return score_losses(run, "perplexity", run.model, examples)
