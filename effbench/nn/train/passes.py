"""Passes over examples, for methods that score them: in batches, and a killed one goes on from where it was."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effbench.core.views import Example
from effbench.nn.train.batches import Batch
from effbench.nn.train.checkpoint import agree, read_state, write_state
from effbench.nn.train.examples import batches, find_losses, looking
from effbench.nn.train.fit import EVERY

if TYPE_CHECKING:
    from effbench.core.run import Run

Visit = Callable[[list[int], Batch], None]  # is given the places of a batch's examples, one a row, and the batch


def go_through(run: Run, name: str, examples: Sequence[Example], state: dict[str, Tensor], visit: Visit) -> None:
    """Have `visit` see all examples, those of similar length together.

    It fills in or adds up the tensors of `state`, in place. Where the run has a folder they are kept there from time to
    time, and a pass of the same `name` over the same examples goes on from what it finds.
    """
    place = None if run.folder is None else run.folder / f"{name}-{len(run.log.steps)}-{_sum_up(examples)}"
    found = None if place is None else read_state(place)
    first, spent = 0, 0.0
    if found is not None:
        first, spent = found["batches"], found["seconds"]
        run.recovered += spent
        for key, tensor in state.items():
            tensor.copy_(found["state"][key])
    begun = written = time.monotonic()
    seen = 0
    for number, (places, batch) in enumerate(batches(run, examples)):
        seen += len(places)
        if number < first:
            continue
        visit(places, batch)
        run.progress("example", seen, len(examples))
        if place is not None:
            now = time.monotonic()
            due = now - written > EVERY or (seen == len(examples) and now - begun > EVERY)
            if agree(due, run.device):
                kept = {"batches": number + 1, "seconds": spent + now - begun, "state": state}
                write_state(place, number + 1, kept, run.device)
                written = now


def score_losses(run: Run, name: str, model: Any, examples: Sequence[Example]) -> Tensor:
    """[N] what `measure_losses` gives, in a pass of this name."""
    losses = torch.zeros(len(examples))

    def visit(places: list[int], batch: Batch) -> None:
        losses[places] = find_losses(model, batch, len(places))

    with looking(model):
        go_through(run, name, examples, {"losses": losses}, visit)
    return losses


def _sum_up(examples: Sequence[Example]) -> str:
    """What tells these examples from others."""
    total = 0
    for example in examples:
        total = zlib.crc32(repr((example.ids, example.prompt)).encode(), total)
    return f"{total:08x}"
