"""DataInf: influences on low-rank factors by a closed form in place of the inverse Hessian (Kwon et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effbench.core import registry
from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._target import Aimed
from effbench.nn.model.beside import Beside
from effbench.nn.model.blocks import Blocks
from effbench.nn.train.batches import Batch
from effbench.nn.train.example_gradients import ROLES, Factor, count_numbers, find_gradients
from effbench.nn.train.fit import fit
from effbench.nn.train.passes import go_through
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.windows import training_on

HELD = 2**27  # numbers of gradients that are kept from one pass to the next, at most


@dataclass(frozen=True)
class DataInf(FitSettings, Aimed):
    """Ranks by how fast the target's loss falls as an example counts more (the paper's influence with the sign turned,
    so that larger is better), on LoRA factors that are fitted for it and leave no trace.

    Each factor is a layer l with gradients g_i of the N examples and v of the target's mean loss. The mean of inverses
    stands for the inverse of the mean (eq. 5): H_l^-1 v = 1 / (N lambda_l) sum_i (v - (g_i . v) / (lambda_l +
    |g_i|^2) g_i), and the score of example k is the sum over layers of g_k . H_l^-1 v.
    """

    paper = "arXiv:2310.00902"
    caveats = ("factors of rank 8 beside queries and values, fitted in 50 steps; the paper's are fitted to the end",)
    type = "data selection"
    usual = 0.2
    trials = ({"steps": 2, "batch_size": 4, "max_length": 32, "rank": 2},)

    steps: int = 50  # of the fit of the factors
    lr: float | tuple[float, ...] = 3e-4  # peak of its learning rate
    rank: int = 8  # of the factors
    alpha: float = 32.0  # their product counts alpha / rank times
    roles: tuple[str, ...] = ("q", "v")  # of the linears that they stand beside; a fused one has several
    damping: float = 0.1  # lambda of a layer is so many times the mean of all squared numbers of its gradients

    def check(self) -> None:
        super().check()
        self.require(not self.find_fault(), self.find_fault())
        self.require(len(self.rates) == 1, "lr is one number")
        self.require(min(self.rank, self.alpha, self.damping) > 0, "rank, alpha and damping must be above 0")
        self.require(bool(self.roles) and {*self.roles} <= {*ROLES}, f"roles are some of {', '.join(ROLES)}")

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        target = self.find_target(run)
        with run.aside(self.key), training_on(run, list(examples)):
            factors = self._place(run)
            fit(run, self)
            return attribute(run, factors, examples, target, self.damping, self.key)

    def _place(self, run: Run) -> list[Factor]:
        """Put factors beside the linears. Raises `Unsupported` where there are none of the roles."""
        there, view = set(run.model.modules()), Blocks(run.model)
        fused = {"qkv"} if {*self.roles} & {*"qkv"} else set()
        names = {path.rpartition(".")[2] for path in run.linears() if view.role(path) in {*self.roles} | fused}
        if not names:
            raise Unsupported(f"{self}: no linear that may be touched has one of these roles")
        lora: type[Any] = registry.load("lora")
        lora(rank=self.rank, alpha=self.alpha, targets=tuple(sorted(names))).apply(run)
        return [
            Factor(path, module, name)
            for path, module in run.model.named_modules()
            if isinstance(module, Beside) and module not in there
            for name, _ in module.named_parameters(recurse=False)
            if name != "bias"
        ]


def attribute(
    run: Run,
    factors: Sequence[Factor],
    examples: Sequence[Example],
    target: Sequence[Example],
    damping: float,
    name: str = "datainf",
) -> Tensor:
    """[N] float64: the sum over layers of g_k . H^-1 v of each example k."""
    sizes, number = count_numbers(factors), len(examples)
    held: dict[int, Tensor] = {}

    def look(places: list[int], batch: Batch) -> Tensor:
        """[B, P] float64 gradients of the examples at these places."""
        if places[0] in held:
            return held[places[0]]
        found = find_gradients(run.model, factors, batch)[1].double().cpu()
        if number * sum(sizes) <= HELD:
            held[places[0]] = found
        return found

    def sum_layers(values: Tensor) -> Tensor:
        """[..., L] sums of numbers [..., P] over those of each layer."""
        return torch.stack([part.sum(-1) for part in values.split(sizes, -1)], -1)

    def spread(values: Tensor) -> Tensor:
        """[..., P] from one number for each layer, [..., L]."""
        return values.repeat_interleave(torch.tensor(sizes), -1)

    aim = torch.zeros(sum(sizes), dtype=torch.float64)

    def add(places: list[int], batch: Batch) -> None:
        aim.add_(find_gradients(run.model, factors, batch)[1].double().cpu().sum(0) / len(target))

    go_through(run, f"{name}-target", target, {"aim": aim}, add)
    squares = torch.zeros(number, len(sizes), dtype=torch.float64)

    def square(places: list[int], batch: Batch) -> None:
        squares[places] = sum_layers(look(places, batch).square())

    go_through(run, f"{name}-squares", examples, {"squares": squares}, square)
    damped = damping * squares.mean(0) / torch.tensor(sizes)  # lambda of each layer
    damped = damped.masked_fill(damped == 0, torch.inf)  # a layer without gradients has no say
    turned = torch.zeros_like(aim)

    def turn(places: list[int], batch: Batch) -> None:
        gradients = look(places, batch)
        share = sum_layers(gradients * aim) / (damped + squares[places])
        turned.add_((spread(share) * gradients).sum(0) / number)

    go_through(run, f"{name}-turned", examples, {"turned": turned}, turn)
    solved = (aim - turned) / spread(damped)
    scores = torch.zeros(number, dtype=torch.float64)

    def rate(places: list[int], batch: Batch) -> None:
        scores[places] = look(places, batch) @ solved

    go_through(run, f"{name}-scores", examples, {"scores": scores}, rate)
    return scores
