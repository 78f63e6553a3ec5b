"""What each of several processes does in the tests of the engines that divide a model. A module of its own: processes
are started with it alone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
import two_ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from effbench.checks import toy_run
from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.recipe import parse
from effbench.core.run import FitReport, Run
from effbench.nn.run import ModelRun
from effbench.nn.train.checkpoint import agree
from effbench.nn.train.fit import fit
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.shards import clip, find_norm
from effbench.nn.train.slots import Precision

SETTINGS = FitSettings(
    steps=3, lr=0.5, batch_size=8, schedule="constant", warmup=0.0, max_length=32, clip=0.05, weight_decay=0.0
)


class Once(Precision):
    """The loss of the first pass is infinite on the last process; gradients that are not finite are skipped."""

    def __init__(self) -> None:
        self.passes = 0

    def scale(self, loss: Tensor, run: Run) -> Tensor:
        self.passes += 1
        last = distributed.is_initialized() and distributed.get_rank() == distributed.get_world_size() - 1
        return loss * math.inf if last and self.passes == 1 else loss

    def unscale(self, parameters: Any, run: Run) -> bool:
        held = [getattr(p.grad, "_local_tensor", p.grad) for p in parameters if p.grad is not None]
        return all(bool(tensor.isfinite().all()) for tensor in held)


@dataclasses.dataclass(frozen=True)
class Overflow(Train):
    """Claims the precision for `Once`."""

    claims: ClassVar = ("train.precision",)

    def slot_values(self) -> dict[str, Any]:
        return {"precision": Once()}


class Case(NamedTuple):
    """A fit that is to end alike on one rank and on several."""

    engine: str  # its step
    architecture: str = "llama"
    steps: str = ""  # of the recipe besides
    methods: tuple[Train, ...] = ()
    changes: dict[str, Any] = {}
    single: bool = False  # float32, else float64
    shape: dict[str, Any] = {}
    adam: bool = False  # else SGD, which hides no factor
    coarse: bool = False  # computed in numbers of few bits, and so summed in another order


FREE = {"clip": None, "lr": 0.05}  # clipping hides a factor common to all gradients, and shows one in their norm
TIED = {"tie_word_embeddings": True}
UNLEARNED = FREE | {"batch_size": 2, "accumulate": 2}
FSDP = {
    "fsdp-1": Case("fsdp(stage=1)", changes={"accumulate": 2}, adam=True),
    "fsdp-2": Case("fsdp(stage=2)", "gpt_neox", changes=FREE | {"validate": 1}),
    "fsdp-3": Case("fsdp()", changes={"accumulate": 2}),
    "fsdp-3-single": Case("fsdp()", changes=FREE, single=True),
    "fsdp-3-tied": Case("fsdp()", "qwen2", shape=TIED),
    "fsdp-3-opt": Case("fsdp()", "opt"),
    "fsdp-2-unlearned": Case("fsdp(stage=2)", methods=(two_ranks.Masking(),), changes=UNLEARNED),
    "fsdp-3-few": Case("fsdp()", changes={"batch_size": 3, "accumulate": 2}),
    "fsdp-3-packed": Case("fsdp()", changes={"layout": "packed"}),
    "fsdp-3-masks": Case("fsdp()", steps="magnitude(sparsity=0.5)", changes=FREE),
    "fsdp-3-lora": Case("fsdp()", steps="lora(), checkpointing()"),
    "fsdp-1-lora": Case("fsdp(stage=1)", steps="lora()"),
    "fsdp-3-shared": Case("fsdp()", steps="prefix_tuning(length=4)", changes=FREE),  # one network feeds all blocks
    "fsdp-3-kd": Case("fsdp()", steps="kd()"),
    "fsdp-3-overflow": Case("fsdp()", changes=FREE, methods=(Overflow(),)),
    "fsdp-3-fp16": Case("fsdp()", steps="fp16(scale=1024.0)", single=True, coarse=True),
    "fsdp-2-fp8": Case("fsdp(stage=2)", steps="fp8()", single=True, coarse=True),
    "fsdp-3-rates": Case("fsdp()", changes={"lr": (0.5, 0.1)}),
}
TP = {
    "tp-llama": Case("tp()", changes=FREE),
    "tp-single": Case("tp()", single=True),
    "tp-neox": Case("tp()", "gpt_neox", changes={"layout": "packed"}),
    "tp-neox-grouped": Case("tp()", "gpt_neox", steps="gqa(kv_heads=2)", changes=FREE),
    "tp-opt": Case("tp()", "opt", changes=FREE),
    "tp-qwen3": Case("tp()", "qwen3", steps="kd(), checkpointing()"),
    "tp-tied": Case("tp()", "qwen2", changes=FREE, shape=TIED),
    "tp-fp16": Case("tp()", steps="fp16(scale=1024.0)", single=True, coarse=True),
    "tp-overflow": Case("tp()", methods=(Overflow(),)),
}
SP = {
    "megatron-llama": Case("sp()", changes=FREE | {"validate": 1}),
    "megatron-single": Case("sp()", single=True),
    "megatron-opt": Case("sp()", "opt", changes=FREE),
    "megatron-qwen3": Case("sp()", "qwen3", shape=TIED),
    "megatron-neox": Case("sp()", "gpt_neox", steps="checkpointing()"),
    "megatron-bf16": Case("sp()", steps="bf16()", single=True, coarse=True),
    "megatron-overflow": Case("sp()", methods=(Overflow(),)),
    "ulysses-llama": Case("sp(kind='ulysses')", changes=FREE, steps="kd()"),
    "ulysses-single": Case("sp(kind='ulysses')", single=True),
    "ulysses-gpt2": Case("sp(kind='ulysses')", "gpt2", changes=FREE | {"layout": "packed"}),
    "ulysses-gpt2-grouped": Case("sp(kind='ulysses')", "gpt2", steps="gqa(kv_heads=2)", changes=FREE),
    "ulysses-opt": Case("sp(kind='ulysses')", "opt", steps="checkpointing(policy='sqrt')"),
    "ulysses-lora": Case("sp(kind='ulysses')", "qwen3", changes=FREE, steps="lora()", shape=TIED),
    "ulysses-masks": Case("sp(kind='ulysses')", "gpt_neox", steps="magnitude(sparsity=0.5)"),
}
CASES = FSDP | TP | SP
FOUR = ("fsdp-2-unlearned", "fsdp-3-few", "tp-neox", "megatron-opt", "ulysses-gpt2")  # with four ranks, too
UNSUPPORTED = {
    "fsdp()": "gkd(lmbda=0.5, new_tokens=4, prompt_tokens=3)",
    "fsdp(stage=3)": "galore(rank=4)",
    "fsdp(stage=2)": "adalora(initial_rank=4, rank=2)",
    "tp()": "lora()",
    "sp()": "magnitude(sparsity=0.5)",
    "sp(kind='ulysses')": "feature_kd()",
    "tp(ranks=2)": "prefix_tuning(length=4)",
    "sp(ranks=2)": "fp8()",
    "fsdp(ranks=2)": "prompt_tuning(length=4)",
}
KILLED = ("fsdp(stage=1)", "fsdp(stage=2)", "fsdp()", "tp()", "sp()")
COST = ("ddp()", "fsdp(stage=1)", "fsdp(stage=2)", "fsdp()", "tp()", "sp()", "sp(kind='ulysses')")


@contextlib.contextmanager
def stepping(adam: bool) -> Iterator[None]:
    """SGD in the place of AdamW inside."""
    if adam:
        yield
    else:
        with mock.patch.object(torch.optim, "AdamW", lambda groups: torch.optim.SGD(groups)):
            yield


def prepare(case: Case, ranks: int) -> ModelRun:
    """A run without dropout, ready to be fitted."""
    run = two_ranks.prepare(case.architecture) if not case.shape else toy_run(case.architecture, shape=case.shape)
    if case.shape:
        run.data.pool = two_ranks.prepare(case.architecture).data.pool
    for module in run.model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for step in parse(case.steps).steps:
        run.apply(step)
    for method in case.methods:
        run.apply(method)
    for model in (run.model, run.reference):
        model.float() if case.single else model.double()
    if ranks > 1:
        run.apply(dataclasses.replace(parse(case.engine).steps[0], ranks=ranks))
    return run


def read(run: ModelRun) -> dict[str, Tensor]:
    """Parameters by name; tied ones by both of their names."""
    return {name: p.detach().clone() for name, p in run.model.named_parameters(remove_duplicate=False)}


def train(case: Case, ranks: int) -> tuple[dict[str, Tensor], FitReport]:
    """Parameters and report of a case."""
    run = prepare(case, ranks)
    changes = {"lr": 1e-3} | case.changes if case.adam else case.changes
    with stepping(case.adam):
        report = fit(run, dataclasses.replace(SETTINGS, **changes))
    return read(run), report


def resume(engine: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], FitReport]:
    """Parameters of a fit that nobody kills and of one that all ranks go on with, in another model; its report."""

    def kill(unit: str, done: int, total: int) -> None:
        if done == 3:
            raise two_ranks.Killed

    def prepared() -> ModelRun:
        run = toy_run("opt")
        run.apply(parse(engine).steps[0])
        run.folder = folder / "scratch"
        return run

    settings = dataclasses.replace(SETTINGS, lr=1e-3, steps=4)
    whole = prepared()
    whole.folder = None
    fit(whole, settings)
    with mock.patch("effbench.nn.train.fit.EVERY", 0.0):
        run = prepared()
        run.progress = kill
        with contextlib.suppress(two_ranks.Killed):
            fit(run, settings)
        report = fit(again := prepared(), settings)
    agree(True, again.device)
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    return read(whole), read(again), report


def refuse(engine: str, steps: str) -> str:
    """Why a fit is unsupported."""
    run = toy_run()
    try:
        for step in parse(f"{engine}, {steps}").steps:
            run.apply(step)
        fit(run, dataclasses.replace(SETTINGS, lr=1e-3))
    except Unsupported as error:
        return str(error)
    return ""


def measure_mixed(rank: int, ranks: int) -> tuple[float, list[Tensor]]:
    """The norm of gradients in parts (some uneven), replicated and plain, and what clipping to 1 leaves of them."""
    mesh = init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(4)]
    placed = [
        distribute_tensor(wholes[0], mesh, [Shard(0)], src_data_rank=None),
        distribute_tensor(wholes[1], mesh, [Shard(1)], src_data_rank=None),
        distribute_tensor(wholes[2], mesh, [Replicate()], src_data_rank=None),
        wholes[3],
    ]
    parameters = [nn.Parameter(torch.zeros_like(tensor)) for tensor in placed]
    for parameter, gradient in zip(parameters, placed, strict=True):
        parameter.grad = gradient.clone()
    norm = float(find_norm(parameters))
    clip(parameters, 1.0)
    grads: list[Any] = [parameter.grad for parameter in parameters]
    return norm, [getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in grads]


def work(rank: int, ranks: int, folder: Path) -> None:
    """Do everything as one of several ranks and write down what came of it."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    names = CASES if ranks == 2 else FOUR
    told: dict[str, Any] = {"cases": {name: train(CASES[name], ranks) for name in names}}
    told["mixed"] = measure_mixed(rank, ranks)
    if ranks == 2:
        told["resumed"] = {engine: resume(engine, folder) for engine in KILLED}
        told["refused"] = {engine: refuse(engine, steps) for engine, steps in UNSUPPORTED.items()}
        costs = (train(Case(engine, single=True, adam=True, changes={"steps": 7}), ranks)[1] for engine in COST)
        told["costs"] = {engine: report["cost"] for engine, report in zip(COST, costs, strict=True)}
    torch.save(told, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
