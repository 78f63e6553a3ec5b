"""What each of several processes does in the tests of engines that divide a model. A module of its own: processes are
started with it alone."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

from effbench.checks import toy_run
from effbench.core.errors import Outcome
from effbench.core.recipe import parse
from effbench.core.run import FitReport
from effbench.core.views import Example
from effbench.methods.parallel import ep
from effbench.methods.precision.fp16 import Scaling
from effbench.nn.run import ModelRun
from effbench.nn.train.checkpoint import agree
from effbench.nn.train.collectives import Collectives
from effbench.nn.train.fit import fit
from effbench.nn.train.settings import FitSettings

SETTINGS = FitSettings(
    steps=3, lr=0.5, batch_size=8, schedule="constant", warmup=0.0, max_length=32, clip=0.05, weight_decay=0.0
)
STILL = {"opt": {"dropout": 0.0}, "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
TIED = {"tie_word_embeddings": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """A fit of float64 numbers, unless told; `{ranks}` stands in its recipe."""

    architecture: str
    steps: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float64


LORA = "lora(rank=4, targets=('q_proj', 'v_proj')), "
CASES = {
    "pp": Case("llama", "pp(ranks={ranks}, microbatches=3)", shape=TIED),
    "pp 1f1b": Case("gpt2", "pp(ranks={ranks}, schedule='1f1b')", {"layout": "packed", "accumulate": 2}),
    "pp one example": Case("opt", "pp(ranks={ranks}, schedule='1f1b')", {"batch_size": 1}),
    "pp untied": Case("gpt_neox", "pp(ranks={ranks})", {"batch_size": 5}),
    "pp experts": Case("mixtral", "pp(ranks={ranks}, microbatches=2)", shape=TIED),
    "pp float32": Case("qwen3", "pp(ranks={ranks})", shape=TIED, dtype=torch.float32),
    "pp kd": Case("llama", "kd(alpha=0.5), pp(ranks={ranks}, microbatches=3)"),
    "pp lora": Case("llama", LORA + "pp(ranks={ranks}), checkpointing()"),
    "pp prefix": Case("llama", "prefix_tuning(length=3, hidden=16), pp(ranks={ranks})"),
    "ep": Case("mixtral", "ep(ranks={ranks})", shape=TIED),
    "ep three": Case("mixtral", "ep(ranks={ranks})", {"batch_size": 3, "accumulate": 2}),
    "ep one example": Case("mixtral", "ep(ranks={ranks})", {"batch_size": 1, "layout": "packed"}),
    "ep float32": Case("mixtral", "ep(ranks={ranks})", shape=TIED, dtype=torch.float32),
    "ep kd": Case("mixtral", "kd(alpha=0.5), ep(ranks={ranks}), checkpointing()"),
    "ep lora": Case("mixtral", LORA + "ep(ranks={ranks})"),
}
EVERYWHERE = ("pp", "pp 1f1b", "pp float32", "ep", "ep three", "ep float32")  # on four ranks, too
OVERFLOWING = {
    "pp": Case("llama", "fp16(growth_every=2), pp(ranks={ranks})", shape=TIED, dtype=torch.float32),
    "ep": Case("mixtral", "fp16(growth_every=2), ep(ranks={ranks})", shape=TIED, dtype=torch.float32),
}
REFUSED = {  # and what is said
    "pp few blocks": (Case("llama", "pp(ranks={ranks})", shape={"layers": 1}), "and the model has 1 blocks"),
    "pp soft prompt": (Case("llama", "prompt_tuning(length=3), pp(ranks={ranks})"), "belongs to no block"),
    "pp hidden": (Case("llama", "feature_kd(), pp(ranks={ranks})"), "sees the whole model at work"),
    "pp attention": (Case("llama", "attention_transfer(), pp(ranks={ranks})"), "reads more of the model than logits"),
    "pp masks": (Case("llama", "gmp(), pp(ranks={ranks})"), "sees the whole model at work"),
    "pp validation": (Case("llama", "pp(ranks={ranks})", {"validate": 1}), "something runs the model within the fit"),
    "pp texts": (Case("llama", "gkd(new_tokens=4, prompt_tokens=3), pp(ranks={ranks})"), "something runs the model"),
    "pp last": (Case("llama", "pp(ranks={ranks})", {"train": "last:1"}), "stage 1 of {ranks} would have nothing"),
    "ep dense": (Case("llama", "ep(ranks={ranks})"), "a llama has no experts to divide"),
    "ep uneven": (Case("mixtral", "ep(ranks={ranks})", shape={"num_local_experts": 3}), "3 experts cannot be divided"),
    "ep texts": (Case("mixtral", "gkd(new_tokens=4, prompt_tokens=3), ep(ranks={ranks})"), "its own examples"),
}


def prepare(case: Case, ranks: int, pool: int = 16) -> ModelRun:
    """A run on documents of unlike lengths, with the steps of a case applied."""
    run = toy_run(case.architecture, shape={"layers": 4} | STILL.get(case.architecture, {}) | case.shape)
    generator = torch.Generator().manual_seed(4)
    sizes = torch.randint(5, 31, (pool,), generator=generator).tolist()
    draw = [torch.randint(1, 95, (size,), generator=generator).tolist() for size in sizes]
    run.data.pool = [Example(str(i), (i + 1, *ids), i % 3) for i, ids in enumerate(draw)]
    run.model.to(case.dtype)
    run.reference.to(case.dtype)
    if case.architecture == "mixtral":
        run.reference.set_experts_implementation("eager")  # the fused form takes no float64
    for step in parse(case.steps.format(ranks=ranks)).steps:
        run.apply(step)
    run.model.to(case.dtype)  # what a step has added, too
    return run


@contextlib.contextmanager
def plain_descent() -> Iterator[None]:
    """SGD where a fit would take AdamW, which hides any constant factor of gradients."""
    with mock.patch.object(torch.optim, "AdamW", torch.optim.SGD):
        yield


def train(case: Case, ranks: int, **changes: Any) -> tuple[dict[str, Tensor], FitReport]:
    """Parameters and report of a case."""
    run = prepare(case, ranks)
    with plain_descent():
        report = fit(run, dataclasses.replace(SETTINGS, **(case.changes | changes)))
    return copy_parameters(run), report


def copy_parameters(run: ModelRun) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in run.model.named_parameters()}


def overflow(case: Case, ranks: int) -> tuple[dict[str, Tensor], FitReport, dict[str, Any]]:
    """As `train`, with an infinite gradient on the last rank in the first pass, and what fp16 keeps."""
    own, done = Scaling.unscale, list[bool]()

    def plant(self: Scaling, parameters: Any, run: Any) -> bool:
        if not done and distributed.get_rank() == ranks - 1:
            held: Any = parameters[-1].grad
            (held.to_local() if hasattr(held, "to_local") else held).view(-1)[0] = math.inf
        done.append(True)
        return own(self, parameters, run)

    run = prepare(case, ranks)
    fp16 = run.train.owner("precision")
    assert fp16 is not None
    kept: dict[str, Any] = {}
    run.progress = lambda *_: kept.update(run.state(fp16))
    with mock.patch.object(Scaling, "unscale", plant), plain_descent():
        report = fit(run, SETTINGS)
    return copy_parameters(run), report, kept


class Killed(Exception):
    """Stands for a kill."""


def resume(case: Case, ranks: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], FitReport]:
    """Parameters of a whole fit, and of one that all ranks go on with after they were killed, by AdamW; its report."""
    settings = dataclasses.replace(SETTINGS, lr=1e-3)

    def kill(unit: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    def prepared() -> ModelRun:
        run = prepare(case, ranks)
        run.folder = folder
        return run

    whole = prepare(case, ranks)
    fit(whole, settings)
    with mock.patch("effbench.nn.train.fit.EVERY", 0.0):
        run = prepared()
        run.progress = kill
        with contextlib.suppress(Killed):
            fit(run, settings)
        agree(True, run.device)
        report = fit(run := prepared(), settings)
    agree(True, run.device)
    if not distributed.get_rank():
        shutil.rmtree(folder)
    return copy_parameters(whole), copy_parameters(run), report


def refuse(case: Case, ranks: int) -> str:
    """What a case ends with."""
    try:
        train(case, ranks)
    except Outcome as outcome:
        return f"{type(outcome).__name__}: {outcome}"
    return ""


def count(case: Case, ranks: int) -> dict[str, Any]:
    """Calls and bytes of one step by kind of collective, rows [H] that were dispatched, and the shape of its batch."""
    run, rows = prepare(case, ranks), list[tuple[int, int]]()
    exchange = ep.exchange

    def note(states: Tensor, received: list[int], sent: list[int]) -> Tensor:
        rows.append((sum(sent), sum(received)))
        return exchange(states, received, sent)

    with Collectives() as counter, mock.patch.object(ep, "exchange", note):
        report = fit(run, dataclasses.replace(SETTINGS, steps=1, max_length=16, **case.changes))
    return {"calls": counter.calls, "bytes": counter.bytes, "rows": rows, "cost": report["cost"]}


def die(case: Case, ranks: int) -> tuple[str, float]:
    """What a rank ends with, and after how many seconds, when the last one is killed in the middle of a fit."""
    run, since = prepare(case, ranks), [0.0]

    def kill(unit: str, done: int, total: int) -> None:
        since[0] = time.monotonic()
        if done == 2 and distributed.get_rank() == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run.progress = kill
    try:
        fit(run, dataclasses.replace(SETTINGS, steps=50))
    except Exception as error:
        return type(error).__name__, time.monotonic() - since[0]
    return "", 0.0


def work(rank: int, ranks: int, folder: Path) -> None:
    """Do all cases as one of several ranks and write down what came of them; the last one is killed in the end."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), ranks)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    found: dict[str, Any] = {
        "trained": {name: train(CASES[name], ranks) for name in (CASES if ranks == 2 else EVERYWHERE)},
        "overflowed": {name: overflow(case, ranks) for name, case in OVERFLOWING.items()},
        "counted": {name: count(CASES[name], ranks) for name in ("pp", "ep")},
    }
    if ranks == 2:
        found["refused"] = {name: refuse(case, ranks) for name, (case, _) in REFUSED.items()}
        found["resumed"] = {name: resume(CASES[name], ranks, folder / "scratch") for name in ("pp", "ep")}
    torch.save(found, folder / f"{rank}.pt")
    found["died"] = die(CASES["pp" if ranks == 2 else "ep"], ranks)
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # there is nobody left to take leave of
