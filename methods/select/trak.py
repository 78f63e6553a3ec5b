"""TRAK: attribution by a linear model in randomly projected gradients (Park et al., 2023)."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._target import Aimed
from effbench.nn.train.batches import Batch
from effbench.nn.train.example_gradients import (
    ROLES,
    Matrix,
    average,
    count_numbers,
    find_gradients,
    find_matrices,
    token_margins,
)
from effbench.nn.train.fit import fit
from effbench.nn.train.passes import go_through
from effbench.nn.train.projections import Signs
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.unlabelled import require_told
from effbench.nn.train.windows import training_on


@dataclass(frozen=True)
class TRAK(FitSettings, Aimed):
    """Ranks by how much an example raises the margin of the target, averaged over the target's examples.

    Features phi = P^T grad f of the margin f = log(p / (1 - p)) (section 3.2, steps 1 and 2), Phi those of the train
    set, q the example's own 1 - p: tau(x, z) = phi(x) . (Phi^T Phi)^-1 phi(z) q(z) (eq. 13), both factors averaged
    over `ensemble` models (eq. 15). These are fitted by `steps` steps on random shares of the train set and leave no
    trace; with 0 steps it is the model as it is: put fit() in front for the trained one.
    """

    paper = "arXiv:2303.14186"
    caveats = (
        "defined for classifiers: means over the learned tokens of margins and of 1 - p are ours, and so are gradients "
        "in some linears; with fewer examples than projected dimensions the inverse is a pseudo-inverse",
    )
    type = "data selection"
    usual = 0.2
    trials = ({"projection": 32}, {"projection": 16, "ensemble": 2, "steps": 2, "batch_size": 4, "max_length": 32})

    steps: int = 0  # of each model's fit; 0: the model as it is
    projection: int = 2048  # dimensions that gradients are projected to
    ensemble: int = 1  # models
    share: float = 0.5  # of the train set that a model is fitted on
    damping: float = 0.0  # is added to the diagonal of Phi^T Phi
    threshold: float = 0.0  # by which each example's effect on one of the target is moved towards 0, at most to it
    blocks: int = 1  # the last ones, whose linears are looked at
    roles: tuple[str, ...] = ("v",)  # of the linears: q, k, v, o, gate, up, down

    def check(self) -> None:
        super().check()
        fault = self.with_steps(max(1, self.steps)).find_fault()
        self.require(not fault, fault)
        self.require(len(self.rates) == 1, "lr is one number")
        self.require(min(self.projection, self.ensemble, self.blocks) > 0, "projection, ensemble, blocks: at least 1")
        self.require(self.steps > 0 or self.ensemble == 1, "models of an ensemble differ by their fits: give steps=")
        self.require(0 < self.share <= 1, "share is of the train set, in (0, 1]")
        self.require(min(self.damping, self.threshold, self.steps) >= 0, "steps, damping, threshold: not negative")
        self.require(bool(self.roles) and {*self.roles} <= {*ROLES}, f"roles are some of {', '.join(ROLES)}")

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        require_told(examples)
        target = self.find_target(run)
        effects = torch.zeros(len(examples), len(target), dtype=torch.float64)
        doubts = torch.zeros(len(examples), dtype=torch.float64)
        for number in range(self.ensemble):
            with self._fitted(run, examples, number):
                parts = find_matrices(run, self.blocks, self.roles)
                signs = Signs(sum(count_numbers(parts)), self.projection, f"{run.seed}/trak/{number}")
                features, doubt = find_features(run, examples, parts, signs, f"{self.key}-{number}")
                aims, _ = find_features(run, target, parts, signs, f"{self.key}-{number}-{self.aim}")
                effects += attribute(features, aims, self.damping) / self.ensemble
                doubts += doubt / self.ensemble
        return nn.functional.softshrink(effects * doubts[:, None], self.threshold).mean(1)

    @contextlib.contextmanager
    def _fitted(self, run: Run, examples: Sequence[Example], number: int) -> Iterator[None]:
        """The model of the run is one of the ensemble inside."""
        if not self.steps:
            yield
            return
        share = round(self.share * len(examples))
        chosen = random.Random(f"{run.seed}/trak/{number}").sample(examples, max(1, share))
        seed = zlib.crc32(f"{run.seed}/trak/{number}".encode())
        with run.aside(f"{self.key}-{number}", seed), training_on(run, chosen):
            fit(run, self)
            yield


def attribute(features: Tensor, aims: Tensor, damping: float) -> Tensor:
    """[N, M]: phi(x) . (Phi^T Phi + damping I)^-1 phi(z) of examples z, Phi [N, K], and x of a target [M, K]."""
    kernel = features.T @ features
    kernel.diagonal().add_(damping)
    return features @ (torch.linalg.pinv(kernel, hermitian=True) @ aims.T)


def find_features(
    run: Run, examples: Sequence[Example], parts: Sequence[Matrix], signs: Signs, name: str
) -> tuple[Tensor, Tensor]:
    """[N, K] float64 projected gradients of the mean margin of each example, and [N] the mean of 1 - p."""
    state = {
        "features": torch.zeros(len(examples), signs.size, dtype=torch.float64),
        "doubts": torch.zeros(len(examples), dtype=torch.float64),
    }

    def visit(places: list[int], batch: Batch) -> None:
        def margin(logits: Tensor, batch: Batch) -> Tensor:
            margins = token_margins(logits, batch)
            state["doubts"][places] = average((-margins).sigmoid().detach(), batch).double().cpu()
            return average(margins, batch)

        gradients = find_gradients(run.model, parts, batch, margin)[1]
        state["features"][places] = signs.project(gradients).double().cpu()

    go_through(run, name, examples, state, visit)
    return state["features"], state["doubts"]
