"""Fits: one loop, or one for each of several learning rates, from a checkpoint where one is left."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from effbench.core.errors import Diverged, Unsupported
from effbench.core.run import FitCost, FitReport
from effbench.core.views import Example
from effbench.nn.train.checkpoint import agree, count_ranks, read_state, write_state
from effbench.nn.train.loop import Loop
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.windows import (
    cut_all,
    find_width,
    measure_loss,
    training_on,
    validation_windows,
    windows_to_choose_by,
)

if TYPE_CHECKING:
    from effbench.core.run import Run

EVERY = float(os.environ.get("EFFBENCH_CHECKPOINT_SECONDS", "60"))  # between checkpoints


class Watch(NamedTuple):
    """What a method looks at while a fit goes on."""

    every: int  # steps between looks
    look: Callable[[int], None]  # is told how many steps were taken; the model computes as it does in the fit
    sums: Tensor  # that looks add to, in place; a fit that is killed goes on with what it held


class Fitted(NamedTuple):
    """What a loop leaves besides the model."""

    report: FitReport
    lines: list[dict[str, Any]]  # of the log, a step each


def fit(run: Run, settings: FitSettings, start: int = 0, watch: Watch | None = None) -> FitReport:
    """Train what is trainable by the train plan, use the plan up, write down what happened and return it.

    Of several learning rates each is tried from the same state, and what the best one left is kept. The first `start`
    steps count as taken: the data and the learning rate go on from there. At one learning rate it may be watched.
    Raises `Unsupported` when nothing is trainable, or where a step needs batches to be fed in the usual way and another
    does not, `Diverged` on a loss that is not finite, `Refused` when a hook loses a tensor.
    """
    _check_feeder(run, settings)
    if run.log.near_duplicates is None:
        run.log.near_duplicates = run.data.count_near_duplicates()
    try:
        if len(settings.rates) > 1:
            assert watch is None, "which of the fits would it be"
            report, lines = choose_rate(run, settings, start)
        else:
            report, lines = train(run, settings, start, watch=watch)
    finally:
        run.train.close()
    if run.folder is not None and not count_ranks()[0]:
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / f"fit-{len(run.log.fits) + 1}.jsonl").write_text(text)
    run.note_fit(report)
    return report


def _check_feeder(run: Run, settings: FitSettings) -> None:
    """Raise `Unsupported` where a method feeds batches its own way and something else needs them as they are."""
    plan, feeder = run.train, run.train.owner("forward")
    if feeder is None:
        return
    if settings.validate or len(settings.rates) > 1:
        raise Unsupported(f"the validation loss is of plain text, and {feeder} is not: give one lr, and no validate")
    engine = plan.owner("parallel")
    readers = [
        method
        for method in plan.chain("loss")
        if any(role != "model" or outputs - {"logits"} for role, outputs in method.reads.items())
    ]
    for other in filter(None, (engine, *readers)):
        raise Unsupported(f"{feeder} feeds batches in a way of its own, in which {other} cannot have a part")
    rewriters = plan.chain("batch")
    later = rewriters[rewriters.index(feeder) + 1 :] if feeder in rewriters else []
    if later:
        raise Unsupported(f"{later[0]} changes batches that {feeder} has laid out: put it before")


def choose_rate(run: Run, settings: FitSettings, start: int) -> Fitted:
    """Train with each learning rate and leave the run as the one with the least validation loss made it.

    What a step costs does not depend on the rate: the first one is looked into, and waits for the machine, for all.
    """
    width = find_width(run, settings)
    windows, number = windows_to_choose_by(run, width, "a learning rate", "give more text, or one lr")
    losses: dict[str, float] = {}
    lines: list[dict[str, Any]] = []
    best: tuple[float, FitReport, Callable[[], None]] | None = None
    seen: FitCost | None = None
    before = run.remember()
    for tried, lr in enumerate(settings.rates):
        before()
        try:
            with count_from(run, settings.steps * tried, settings.steps * len(settings.rates)):
                report, told = train(run, dataclasses.replace(settings, lr=lr), start, look=seen is None)
            seen = seen or report["cost"]
            report["cost"] = seen | report["cost"]
            lines += [line | {"rate": lr} for line in told]
            loss = measure_loss(run, windows, settings.batch_size)
        except Diverged:
            loss = math.inf
        losses[str(lr)] = loss
        if loss < (best[0] if best else math.inf):
            best = loss, report, run.remember()
    if best is None:
        before()
        raise Diverged(f"the loss is not finite with any learning rate of {', '.join(losses)}")
    _, report, restore = best
    restore()
    rates = {rate: loss if math.isfinite(loss) else None for rate, loss in losses.items()}
    return Fitted(report | {"rates": rates, "validation_tokens": number}, lines)


def train(run: Run, settings: FitSettings, start: int, look: bool = True, watch: Watch | None = None) -> Fitted:
    """One loop, at one learning rate, from its checkpoint if it has left one; steps are looked into and timed unless
    told."""
    width = find_width(run, settings)
    unread = run.data.extend((settings.steps - start) * settings.batch_size * width)
    examples, left_out = cut_all(run.data.train, width, unread)
    loop = Loop(run, settings, examples, width, look)
    with training_on(run, examples), loop.open():
        go(loop, start, validation_windows(run, width) if settings.validate else (), watch)
    report = loop.report()
    return Fitted(report | {"left_out": left_out} if left_out else report, loop.lines)


def go(loop: Loop, start: int, windows: Sequence[Example], watch: Watch | None = None) -> None:
    """Take the steps of a loop that is open, with checkpoints where the run has a folder.

    The last state is kept, too, if the fit took long: a later step of the recipe may be killed as well.
    """
    run, settings = loop.run, loop.settings
    place = None if run.folder is None else run.folder / f"fit-{loop.number + 1}-{settings.rates[0]}"
    state = read_state(place) if place is not None else None
    if state is not None:
        start = loop.restore(state)
        if watch is not None:
            watch.sums.copy_(state["sums"])
    written = time.monotonic()
    for index in range(start, settings.steps):
        line = loop.meter.take(index - start, functools.partial(loop.step, index))
        last = index + 1 == settings.steps
        if settings.validate and (last or (index + 1) % settings.validate == 0):
            line["validation"] = measure_loss(run, windows, settings.batch_size)
        if watch is not None and (index + 1) % watch.every == 0:
            with loop.precision.forward(run):
                watch.look(index + 1)
        run.progress("training step", index + 1, settings.steps)
        if place is not None:
            due = time.monotonic() - written > EVERY or (last and loop.seconds > EVERY)
            if agree(due, run.device):  # by the clock of any process
                sums = {} if watch is None else {"sums": watch.sums}
                write_state(place, index + 1, loop.state() | sums, run.device)
                written = time.monotonic()


@contextlib.contextmanager
def count_from(run: Run, before: int, total: int) -> Iterator[None]:
    """Have progress inside count on from `before`, of `total`."""
    tell = run.progress
    run.progress = lambda unit, done, _: tell(unit, before + done, total)
    try:
        yield
    finally:
        run.progress = tell
