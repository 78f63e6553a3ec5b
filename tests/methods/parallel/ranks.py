"""What each of several processes does in tests of engines. They are started with this module and cases alone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor, distributed, nn

from effbench.checks import toy_run
from effbench.core.errors import Outcome
from effbench.core.kinds import Train
from effbench.core.recipe import parse
from effbench.core.run import FitReport, Run
from effbench.core.views import Example
from effbench.methods.parallel._ranks import Ranks
from effbench.nn.model.held import local
from effbench.nn.run import ModelRun
from effbench.nn.train.checkpoint import REST, agree, count_ranks
from effbench.nn.train.fit import fit
from effbench.nn.train.samplers import InOrder
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.slots import Precision

SETTINGS = FitSettings(steps=3, lr=0.5, batch_size=8, schedule="constant", warmup=0.0, max_length=32, clip=0.05)
STILL = {"opt": {"dropout": 0.0}, "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
DROPOUT = {"dropout": 0.1}  # of an opt
TIED = {"tie_word_embeddings": True}


class Case(NamedTuple):
    """A fit that is to end alike in one process and in several."""

    recipe: str  # whose engine is left out in one process, and takes all that are there
    architecture: str = "llama"
    layers: int = 2
    shape: dict[str, Any] = {}  # entries of the configuration besides
    methods: tuple[Train, ...] = ()  # that come before the recipe
    changes: dict[str, Any] = {}  # of `SETTINGS`
    documents: int = 16
    single: bool = False  # float32, else float64
    adam: bool = False  # else SGD, which hides no factor
    coarse: bool = False  # computed in numbers of few bits, and so summed in another order
    overflows: dict[int, str] = {}  # passes whose "loss" or "gradients" do, in the last of several processes

    @property
    def settings(self) -> FitSettings:
        """What it is fitted with."""
        return dataclasses.replace(SETTINGS, **({"lr": 1e-3} if self.adam else {}) | self.changes)


class Trained(NamedTuple):
    """What a fit leaves."""

    parameters: dict[str, Tensor]  # tied ones by both of their names
    report: FitReport
    moved: float  # by the number that has moved most
    kept: dict[str, Any]  # by the method that says in which numbers is computed


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What processes do and write down for one kind of engines."""

    name: str
    cases: dict[str, Case]  # that two train
    killed: dict[str, Case]  # that two are killed in, and go on with
    four: tuple[str, ...] = ()  # cases that four train, too
    refused: dict[str, tuple[Case, str]] = dataclasses.field(default_factory=dict)  # by two, and what they say
    measure: Callable[[int], dict[str, Any]] | None = None  # what so many find besides
    fatal: dict[int, Case] = dataclasses.field(default_factory=dict)  # in which the last of so many dies in the end


@dataclasses.dataclass(frozen=True)
class Ordered(Train):
    """Reads examples as they come."""

    def sampler(self, examples: Any, run: Run) -> InOrder:
        return InOrder(len(examples))


@dataclasses.dataclass(frozen=True)
class Masking(Ordered):
    """Nothing is learned of every second example, so that in batches of two one rank has nothing to learn."""

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        labels = batch["labels"].clone()
        labels[batch["input_ids"][:, 0] % 2 == 0] = -100
        return batch | {"labels": labels}


class Finite(Precision):
    """Gradients that are not finite are skipped."""

    def unscale(self, parameters: Sequence[nn.Parameter], run: Run) -> bool:
        return all(bool(local(p.grad).isfinite().all()) for p in parameters if p.grad is not None)


@dataclasses.dataclass(frozen=True)
class Skipping(Train):
    """Claims the precision for `Finite`."""

    claims: ClassVar = ("train.precision",)

    def slot_values(self) -> dict[str, Any]:
        return {"precision": Finite()}


class Killed(Exception):
    """Stands for a kill."""


def prepare(case: Case, ranks: int) -> ModelRun:
    """A run on documents of unlike lengths, as one of so many processes fits it."""
    run = toy_run(case.architecture, shape={"layers": case.layers} | STILL.get(case.architecture, {}) | case.shape)
    generator = torch.Generator().manual_seed(4)
    sizes = torch.randint(5, 31, (case.documents,), generator=generator).tolist()
    draw = [torch.randint(1, 95, (size,), generator=generator).tolist() for size in sizes]
    run.data.pool = [Example(str(i), (i + 1, *ids), i % 3) for i, ids in enumerate(draw)]
    dtype = torch.float32 if case.single else torch.float64
    for model in (run.model, run.reference):
        model.to(dtype)
    if case.architecture == "mixtral":
        run.reference.set_experts_implementation("eager")  # the fused form takes no float64
    for method in (*case.methods, *parse(case.recipe).steps):
        if not isinstance(method, Ranks):
            run.apply(method)
        elif ranks > 1:
            run.apply(dataclasses.replace(method, ranks=ranks))
    run.model.to(dtype)  # what a method has added, too
    return run


@contextlib.contextmanager
def overflow(run: ModelRun, passes: dict[int, str]) -> Iterator[None]:
    """Have losses or gradients of some passes be infinite inside, in the last of several processes alone."""
    rank, ranks = count_ranks()
    if not passes or not 0 < rank == ranks - 1:
        yield
        return
    precision, passed = run.train.slot("precision"), 0
    own_scale, own_unscale = precision.scale, precision.unscale

    def scale(loss: Tensor, run: Run) -> Tensor:
        scaled: Tensor = own_scale(loss, run)
        return scaled * math.inf if passes.get(passed) == "loss" else scaled

    def unscale(parameters: Sequence[nn.Parameter], run: Run) -> bool:
        nonlocal passed
        if passes.get(passed) == "gradients":
            assert parameters[-1].grad is not None
            local(parameters[-1].grad).view(-1)[0] = math.inf
        passed += 1
        return bool(own_unscale(parameters, run))

    with mock.patch.multiple(precision, scale=scale, unscale=unscale):
        yield


def take_steps(run: ModelRun, case: Case) -> Trained:
    """Fit a run as a case says."""
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    method = run.train.owner("precision")
    optimizer = torch.optim.AdamW if case.adam else torch.optim.SGD
    with mock.patch.object(torch.optim, "AdamW", optimizer), overflow(run, case.overflows):
        report = fit(run, case.settings)
    after = {name: p.detach().clone() for name, p in run.model.named_parameters(remove_duplicate=False)}
    moved = max(float((after[name] - value).abs().max()) for name, value in before.items())
    return Trained(after, report, moved, dict(run.state(method)) if method else {})


def train(case: Case, ranks: int) -> Trained:
    """What a case comes to in one of so many processes."""
    return take_steps(prepare(case, ranks), case)


def resume(case: Case, ranks: int, folder: Path) -> tuple[Trained, Trained]:
    """A whole fit, and one that all ranks go on with after they were killed in its last step; one was faster."""
    last = case.settings.steps - 1

    def kill(unit: str, done: int, total: int) -> None:
        if done == last:
            raise Killed

    whole = train(case, ranks)
    with mock.patch("effbench.nn.train.fit.EVERY", 0.0):
        run = prepare(case, ranks)
        run.folder, run.progress = folder, kill
        with contextlib.suppress(Killed):
            take_steps(run, case)
        if not count_ranks()[0]:
            (left,) = folder.iterdir()
            (left / f"{last}/0").mkdir(parents=True)  # a step whose other parts are not written yet
            (left / f"{last}/0" / REST).touch()
        agree(True, run.device)
        run = prepare(case, ranks)
        run.folder = folder
        return whole, take_steps(run, case)


def refuse(case: Case, ranks: int) -> str:
    """What a case ends with."""
    try:
        train(case, ranks)
    except Outcome as outcome:
        return f"{type(outcome).__name__}: {outcome}"
    return ""


def die(case: Case, ranks: int) -> tuple[str, float]:
    """What a rank ends with, and after how many seconds, when the last one is killed in the middle of a fit."""
    run, since = prepare(case, ranks), [0.0]

    def kill(unit: str, done: int, total: int) -> None:
        since[0] = time.monotonic()
        if done == 2 and count_ranks()[0] == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run.progress = kill
    try:
        take_steps(run, case._replace(changes=case.changes | {"steps": 50}))
    except Exception as error:
        return type(error).__name__, time.monotonic() - since[0]
    return "", 0.0


def work(program: Program, rank: int, ranks: int, folder: Path) -> None:
    """Do a program as one of several ranks and write down what came of it."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", ranks)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    names = program.cases if ranks == 2 else program.four
    found: dict[str, Any] = {"trained": {name: train(program.cases[name], ranks) for name in names}}
    if program.measure is not None:
        found |= program.measure(ranks)
    if ranks == 2:
        killed = program.killed.items()
        found["resumed"] = {name: resume(case, ranks, folder / "scratch" / name) for name, case in killed}
        found["refused"] = {name: refuse(case, ranks) for name, (case, _) in program.refused.items()}
    torch.save(found, folder / f"{rank}.pt")
    if ranks in program.fatal:
        found["died"] = die(program.fatal[ranks], ranks)
        torch.save(found, folder / f"{rank}.pt")
        os._exit(0)  # there is nobody left to take leave of
    distributed.destroy_process_group()
