"""Lottery tickets: train, prune the smallest weights, rewind the rest, train again (Frankle & Carbin, 2019)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Literal, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.method import Method
from effbench.core.run import Run
from effbench.formats.sparse import PrunedLinear
from effbench.methods.prune._common import check_pattern, keep_mask
from effbench.methods.prune._training import train_like, trainable_linears
from effbench.nn.model.linear import dense_weight, kept, replace
from effbench.nn.train.fit import count_from, fit
from effbench.nn.train.settings import FitSettings

State = dict[str, Tensor]  # every parameter by its name; weights of linears as [out, in]


@dataclass(frozen=True)
class Rewound(Train):
    """Takes a copy of all parameters after a step of the dense fit; `linears` are the paths of the linears."""

    step: int
    linears: tuple[str, ...]

    def on_step(self, run: Run) -> None:
        assert run.step is not None
        if run.step.index + 1 == self.step:
            run.state(self)["start"] = copy_parameters(run.model, list(self.linears))


@dataclass(frozen=True)
class LotteryTicket(FitSettings, Method):
    """Iterative magnitude pruning: every round prunes the same fraction of each matrix's surviving weights.

    Fits itself, `rounds` + 1 times. Of several learning rates the dense fit chooses.
    """

    paper = "arXiv:1803.03635"
    caveats = ("rewinds to the trained model; tickets of Frankle & Carbin start from random weights",)
    type = "sparse training"
    weight_update = "training"
    sparsifies = True
    settles = True
    trials = ({"steps": 3, "rounds": 2, "rewind": 1, "batch_size": 4, "max_length": 32},)

    sparsity: float = 0.5  # after the last round, of every matrix
    rounds: int = 3  # of pruning, each followed by a fit
    rewind: int = 0  # optimizer step whose parameters every round starts from, above 0 as in arXiv:1912.05671
    control: Literal["none", "reinit"] = "none"  # reinit: the last round trains the same masks from random parameters

    def check(self) -> None:
        check_pattern(self, self.sparsity, "unstructured")
        self.require(self.rounds > 0, "rounds must be at least 1")
        self.require(0 <= self.rewind < self.steps, "rewind is a step of the fit, in [0, steps)")
        self.require(not self.find_fault(), self.find_fault())

    def shorten(self, steps: int, batch_size: int, max_length: int) -> Self:
        rewound = replace_fields(self, rewind=min(self.rewind, steps - 1))
        return super(LotteryTicket, rewound).shorten(steps, batch_size, max_length)

    def apply(self, run: Run) -> None:
        linears = trainable_linears(run)
        kept_at = Rewound(self.rewind, tuple(linears))
        start = run.state(kept_at)
        start["start"] = copy_parameters(run.model, list(linears))
        tried = len(self.rates)
        total = self.steps * (tried + self.rounds)
        with run.own_fits():
            run.attach(kept_at)
            with count_from(run, 0, total):
                settings = replace_fields(self, lr=fit(run, self)["lr"])
            values = start.pop("start")  # freed at the end: it is as large as the model
            for number in range(1, self.rounds + 1):
                masks = {path: self._survivors(run.model.get_submodule(path), path, number) for path in linears}
                again = self.control == "reinit" and number == self.rounds
                restore(run.model, draw_parameters(run, values) if again else values, masks)
                with count_from(run, self.steps * (tried + number - 1), total):
                    fit(run, settings, start=self.rewind)

    def _survivors(self, linear: nn.Module, path: str, number: int) -> Tensor:
        """Bool [out, in]: what is left after round `number`."""
        score, alive = dense_weight(linear).abs(), kept(linear)
        if alive is not None:
            score = score.masked_fill(~alive, -1.0)  # a surviving weight may be 0 as well
        sparsity = self.sparsity if number == self.rounds else 1 - (1 - self.sparsity) ** (number / self.rounds)
        keep = keep_mask(score, sparsity)
        return keep if alive is None else keep & alive


def copy_parameters(model: nn.Module, paths: list[str]) -> State:
    """A copy of all parameters; `paths` are those of the linears."""
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for path in paths:
        if isinstance(model.get_submodule(path), Conv1D):
            parameters[f"{path}.weight"] = parameters[f"{path}.weight"].T.contiguous()
    return parameters


@torch.no_grad()
def restore(model: nn.Module, values: State, masks: dict[str, Tensor]) -> None:
    """Set all parameters to `values` and hold the linears at zero where their masks are False."""
    for path, keep in masks.items():
        old = model.get_submodule(path)
        new = PrunedLinear.of(values[f"{path}.weight"], keep, values.get(f"{path}.bias"))
        replace(model, path, train_like(old, new))
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in masks:
            parameter.copy_(values[name])


def draw_parameters(run: Run, like: State) -> State:
    """Parameters of the architecture's own random initialisation. Raises `Unsupported` if they do not fit `like`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{run.seed}/reinit".encode()))
        model = type(run.model)(run.model.config)
    linears = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    drawn = copy_parameters(model, linears)
    for name, value in like.items():
        if name not in drawn or drawn[name].shape != value.shape:
            raise Unsupported(f"{name}: the architecture initialises no such parameter; leave control='reinit' out")
    return {name: drawn[name].to(value) for name, value in like.items()}
