"""EL2N: how wrong a model still is about an example early in training (Paul et al., 2021)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.model.feed import feed
from effbench.nn.train.batches import Batch
from effbench.nn.train.example_gradients import average
from effbench.nn.train.examples import looking
from effbench.nn.train.fit import Watch, fit
from effbench.nn.train.loss import learned, learned_logits
from effbench.nn.train.passes import go_through
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.windows import training_on


@dataclass(frozen=True)
class EL2N(FitSettings, Select):
    """Keeps what the model is most wrong about: the norm of p - onehot, a mean over short fits (definition 2).

    The `times` fits differ in the order of the data, end early and leave no trace. `average="epochs"` looks `times`
    times at one fit instead, after every `steps` steps. `band` ranks what lies outside of two quantiles last.
    """

    paper = "arXiv:2107.07075"
    caveats = (
        "defined for classifiers: the mean over the learned tokens is ours, and so are a pretrained start and 20 steps "
        "for the paper's 10 random ones and 20 of 200 epochs",
    )
    type = "data selection"
    usual = 0.2
    trials = ({"steps": 2, "times": 2, "batch_size": 4, "max_length": 32},)

    steps: int = 20  # of a fit before it is looked at
    schedule: Literal["cosine", "linear", "constant"] = "constant"  # of the learning rate after the warm-up
    times: int = 10  # fits, or looks at one, that are averaged over
    average: Literal["runs", "epochs"] = "runs"  # over fits, as published, or over moments of one, a variant
    band: tuple[float, float] | None = None  # quantiles between which scores are to lie, (0.2, 0.8) for a variant

    def check(self) -> None:
        super().check()
        self.require(not self.find_fault(), self.find_fault())
        self.require(len(self.rates) == 1, "lr is one number: fits end before one could be chosen")
        self.require(self.times > 0, "times must be at least 1")
        low, high = self.band or (0.0, 1.0)
        self.require(0 <= low < high <= 1, "band is two quantiles, such as (0.2, 0.8)")

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        runs, looks = (self.times, 1) if self.average == "runs" else (1, self.times)
        total = torch.zeros(len(examples), dtype=torch.float64)
        for number in range(runs):
            seed = zlib.crc32(f"{run.seed}/el2n/{number}".encode())
            with run.aside(f"{self.key}-{number}", seed), training_on(run, list(examples)):
                total += self._look(examples, run, looks)
        scores = total / self.times
        if self.band is None:
            return scores
        low, high = torch.quantile(scores, torch.tensor(self.band, dtype=scores.dtype))
        return torch.where((low <= scores) & (scores <= high), scores, scores - 2)  # norms are at most sqrt(2)

    def _look(self, examples: Sequence[Example], run: Run, looks: int) -> Tensor:
        """[N] float64: sums of the errors at so many looks at one fit, the last of them at its end."""
        errors = torch.zeros(len(examples), dtype=torch.float64)

        def look(taken: int) -> None:
            errors.add_(measure_errors(run, examples, f"{self.key}-{taken}"))

        fit(run, self.with_steps(self.steps * looks), watch=Watch(self.steps, look, errors))
        return errors


def measure_errors(run: Run, examples: Sequence[Example], name: str) -> Tensor:
    """[N] float64: the mean of |p - onehot| over the learned tokens of each example; 0 where there are none."""
    state = {"errors": torch.zeros(len(examples), dtype=torch.float64)}

    def visit(places: list[int], batch: Batch) -> None:
        with looking(run.model):
            error = learned_logits(feed(run.model, batch).logits, batch).softmax(-1)
        error[torch.arange(len(error), device=error.device), batch["labels"][:, 1:][learned(batch)]] -= 1
        state["errors"][places] = average(error.norm(dim=-1), batch).double().cpu()

    go_through(run, name, examples, state, visit)
    return state["errors"]
