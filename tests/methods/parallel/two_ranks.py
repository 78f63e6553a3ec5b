"""What each of two processes does in the tests of `ddp`. A module of its own: processes are started with it alone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, distributed, nn

from effbench.checks import toy_run
from effbench.core.kinds import Train
from effbench.core.run import FitReport, Run
from effbench.core.views import Example
from effbench.methods.distill.gkd import GKD
from effbench.methods.distill.minillm import MiniLLM
from effbench.methods.parallel.ddp import DDP
from effbench.methods.precision.fp8 import FP8
from effbench.nn.run import ModelRun
from effbench.nn.train.checkpoint import agree
from effbench.nn.train.fit import fit
from effbench.nn.train.samplers import InOrder
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.slots import Precision

SETTINGS = FitSettings(steps=4, lr=1e-3, batch_size=8, schedule="constant", warmup=0.0, max_length=32)


@dataclasses.dataclass(frozen=True)
class Masking(Train):
    """Nothing is learned of every second example, so that in batches of two one rank has nothing to learn."""

    def sampler(self, examples: Any, run: Run) -> InOrder:
        return InOrder(len(examples))

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        labels = batch["labels"].clone()
        labels[batch["input_ids"][:, 0] % 2 == 0] = -100
        return batch | {"labels": labels}


@dataclasses.dataclass(frozen=True)
class Ordered(Train):
    """Reads five examples in batches of four: the last batch is smaller than the ranks."""

    def sampler(self, examples: Any, run: Run) -> InOrder:
        return InOrder(len(examples))


class Overflowing(Precision):
    """Gradients of the first pass of every step overflow, on one process alone."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    def unscale(self, parameters: Sequence[nn.Parameter], run: Run) -> bool:
        last = distributed.get_rank() == 1 if distributed.is_initialized() else True
        if last and (not self.told or self.told[-1]):
            assert parameters[0].grad is not None
            parameters[0].grad.view(-1)[0] = math.inf
            return False
        return True

    def settle(self, taken: bool, run: Run) -> None:
        self.told.append(taken)


@dataclasses.dataclass(frozen=True)
class Skipping(Train):
    """Has every step taken twice."""

    claims: ClassVar = ("train.precision",)

    def slot_values(self) -> dict[str, Any]:
        return {"precision": Overflowing()}


CASES: dict[str, tuple[str, list[Train], dict[str, Any]]] = {
    "eight": ("llama", [], {"clip": 1.0}),
    "accumulated": ("llama", [], {"accumulate": 2, "clip": 0.1}),
    "packed": ("gpt_neox", [], {"layout": "packed"}),
    "three": ("llama", [], {"batch_size": 3}),
    "one": ("llama", [], {"batch_size": 1}),
    "unlearned": ("llama", [Masking()], {"batch_size": 2}),
    "skipped": ("llama", [Skipping()], {"clip": 0.1}),
    "short": ("llama", [Ordered()], {"batch_size": 4}),
    "written": ("llama", [GKD(lmbda=0.5, alpha=0.5, new_tokens=4, prompt_tokens=3)], {"accumulate": 2}),
    "rewarded": ("llama", [MiniLLM(new_tokens=4, prompt_tokens=3, epochs=2)], {"batch_size": 5, "accumulate": 2}),
}


def prepare(architecture: str, pool: int = 16) -> ModelRun:
    """A run in float64 on documents of unlike lengths."""
    run = toy_run(architecture)
    generator = torch.Generator().manual_seed(4)
    sizes = torch.randint(5, 31, (pool,), generator=generator).tolist()
    draw = [torch.randint(1, 95, (size,), generator=generator).tolist() for size in sizes]
    run.data.pool = [Example(str(i), (i + 1, *ids), i % 3) for i, ids in enumerate(draw)]
    run.model.double()
    run.reference.double()
    return run


def train(name: str, ranks: int) -> tuple[dict[str, Tensor], FitReport]:
    """Parameters and report of a case."""
    architecture, methods, changes = CASES[name]
    run = prepare(architecture, 5 if name == "short" else 16)
    for method in [*methods, *([DDP(ranks=ranks)] if ranks > 1 else [])]:
        run.apply(method)
    report = fit(run, dataclasses.replace(SETTINGS, **changes))
    return {key: value.detach().clone() for key, value in run.model.named_parameters()}, report


def scale(ranks: int) -> tuple[dict[str, Tensor], FitReport]:
    """The scales of 8-bit floats, what they are made of, and the report, after a fit whose parts are unlike in size."""
    run = prepare("llama")
    for method in [fp8 := FP8(), *([DDP(ranks=ranks)] if ranks > 1 else [])]:
        run.apply(method)
    report = fit(run, SETTINGS)
    return {key: value.clone() for key, value in run.state(fp8).items()}, report


class Killed(Exception):
    """Stands for a kill."""


def resume(rank: int, folder: Path) -> tuple[dict[str, Tensor], FitReport]:
    """Parameters and report of a fit that both ranks go on with after they were killed; one was faster."""

    def kill(unit: str, done: int, total: int) -> None:
        if done == 3:
            raise Killed

    def prepared() -> ModelRun:
        run = toy_run("opt")
        run.apply(DDP())
        run.folder = folder / "scratch"
        return run

    with mock.patch("effbench.nn.train.fit.EVERY", 0.0):
        run = prepared()
        run.progress = kill
        with contextlib.suppress(Killed):
            fit(run, SETTINGS)
        (left,) = run.folder.iterdir()
        if not rank:
            shutil.copytree(left / "2" / "0", left / "3" / "0")  # a step whose other part is not written yet
        agree(True, run.device)
        report = fit(run := prepared(), SETTINGS)
    return {key: value.detach().clone() for key, value in run.model.named_parameters()}, report


def work(rank: int, store: str, folder: str) -> None:
    """Do all cases as one of two ranks and write down what came of them."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
    results = {name: train(name, 2) for name in CASES} | {"scaled": scale(2)}
    run = toy_run("opt")  # which has dropout
    run.apply(DDP())
    fit(run, SETTINGS)
    dropped = {key: value.detach().clone() for key, value in run.model.named_parameters()}
    torch.save((results, dropped, *resume(rank, Path(folder))), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
