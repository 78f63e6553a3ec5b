"""Students, teachers and layouts of a batch that tests of distillation share."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

from effbench.checks import toy, toy_run
from effbench.core.kinds import Train
from effbench.core.views import Example
from effbench.methods.distill.student import Student
from effbench.nn.model.blocks import Blocks
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import collate, pack
from effbench.nn.train.outputs import Roles

TEACHER = {"layers": 4, "seed": 3}  # other weights than the student's
EXAMPLES = [  # uneven, some with a prompt, none counting as another
    Example("a", tuple(range(3, 12)), prompt=4, weight=1.0),
    Example("b", tuple(range(20, 40)), prompt=0, weight=3.0),
    Example("c", tuple(range(50, 55)), prompt=2, weight=0.5),
]


def pair(architecture: str = "llama", student: Student | None = None, **teacher: Any) -> ModelRun:
    """A student in float64 beside a teacher called `teacher` in float64, which is another model."""
    run = toy_run(architecture)
    if student is not None:
        run.apply(student)
    run.shelve("teacher", toy(architecture, **(TEACHER | teacher)).double(), run.tokenizer)
    run.model.double()
    return run


def terms(run: ModelRun, method: Any, batch: dict[str, Tensor], train: Any = None) -> dict[str, Tensor]:
    """The loss terms of a method on a batch; `train(module)` may change what its context puts into the model."""
    with contextlib.ExitStack() as stack:
        if isinstance(method, Train) and method.overrides("context"):
            torch.manual_seed(5)
            stack.enter_context(method.context(run))
        if train is not None:
            train(run.model)
        roles = Roles(run, [method])
        stack.enter_context(run.reading(roles))
        stack.enter_context(roles.open())
        return method.loss(batch, roles.feed(batch), run)


def flip(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch that is padded on the right with its padding on the left."""
    lengths = (batch["example"] >= 0).sum(1)
    width = batch["example"].shape[1]
    order = (torch.arange(width)[None] - (width - lengths)[:, None]) % width
    turned = {name: tensor.gather(1, order) for name, tensor in batch.items()}
    real = turned["example"] >= 0
    return turned | {"position_ids": (real.cumsum(1) - 1).clamp(min=0)}


def layouts(run: ModelRun, examples: list[Example] = EXAMPLES) -> dict[str, dict[str, Tensor]]:
    right = collate(examples, 0, run.device)
    return {"right": right, "left": flip(right), "packed": pack(examples, 32, 0, run.device)}


def check_layouts(run: ModelRun, method: Any) -> None:
    """Every layout of a batch has the sum of what its rows alone have, by the weights of their learned tokens."""

    def total(batch: dict[str, Tensor]) -> float:
        return float(sum(terms(run, method, batch).values()).detach())  # type: ignore[union-attr]

    plain = [dataclasses.replace(example, weight=1.0) for example in EXAMPLES]
    rows = [total(collate([example], 0, run.device)) for example in plain]
    counts = [e.weight * (len(e.ids) - max(1, e.prompt)) for e in EXAMPLES]
    expected = sum(n * row for n, row in zip(counts, rows, strict=True)) / sum(counts)
    assert expected > 0 and max(rows) > 1.0001 * min(rows)
    for name, batch in layouts(run).items():
        assert abs(total(batch) - expected) < 1e-9 * expected, name


def read_blocks(model: Any, ids: list[int]) -> list[Tensor]:
    """[T, width] that each block gives for one row, by hooks of this test's own."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out if isinstance(out, Tensor) else out[0]))
        for block in Blocks(model).blocks
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return [states[0] for states in found]
