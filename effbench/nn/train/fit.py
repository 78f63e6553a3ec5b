"""The one training loop. Every hook of the train plan stands here in its place:

context                              around everything
    param_groups                     of the optimizer, each trainable tensor in one of them
    optimizer, optimizer_wrap        AdamW where the slot `optimizer` is empty
    for each step:
        draw (slot sampler), batch   examples to tensors
        forward (slot precision)     in a context of its own, if there is one
        loss                         named terms; cross-entropy only if none is called `hard`
        backward
        gradients of weights held at zero are zeroed
        clip, optimizer step
        weights held at zero are zeroed again
        on_step                      after the step, before gradients are cleared

Trained tensors that the model keeps in a 16-bit type are float32 inside, because steps below its resolution add up only
so; what the model computes with is then rounded by autocast, unless the slot `precision` says how.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from effbench.core.errors import Diverged, Unsupported
from effbench.core.run import FitReport
from effbench.core.usage import list_some
from effbench.core.views import Example
from effbench.nn.data import count_learned, cut
from effbench.nn.model.blocks import count_positions
from effbench.nn.model.linear import MaskedLinear
from effbench.nn.train.groups import describe_group, group_parameters, widen

if TYPE_CHECKING:
    from effbench.core.run import Run

IGNORED = -100  # label of a token that is not learned
VALIDATION = 2**14  # tokens of the validation part, at most; and no more than a tenth of the pool
LEAST = 2**7  # tokens by which a learning rate can be chosen


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """The hyper-parameters of a fit."""

    steps: int = 200  # of the optimizer
    lr: float | tuple[float, ...] = 1e-4  # peak of the learning rate; of several, that of the least validation loss
    batch_size: int = 8  # examples per step
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the learning rate after the warm-up
    warmup: float = 0.03  # fraction of the steps
    clip: float | None = 1.0  # largest gradient norm
    weight_decay: float = 0.0  # of AdamW, on matrices; vectors, embeddings and what a module excepts have none
    max_length: int = 512  # tokens of a window of the train set, at most as many as the model has positions

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)

    def find_fault(self) -> str:
        """What is wrong with the learning rate, whatever data and model; empty if nothing is."""
        if isinstance(self.lr, tuple) and len(set(self.lr)) < max(2, len(self.lr)):
            return "lr is one number or several different ones"
        return "" if min(self.rates) > 0 else "lr must be above 0"


def fit(run: Run, settings: FitSettings, start: int = 0) -> FitReport:
    """Train what is trainable by the train plan, use the plan up, write in the log what happened and return it.

    Of several learning rates each is tried from the same state, and what the best one left is kept. The first `start`
    steps count as taken: the data and the learning rate go on from there. Raises `Unsupported` when nothing is
    trainable, `Diverged` on a loss that is not finite, `Refused` when a hook loses a tensor.
    """
    try:
        report = (choose_rate if len(settings.rates) > 1 else train)(run, settings, start)
    finally:
        run.train.close()
    run.note_fit(report)
    return report


def choose_rate(run: Run, settings: FitSettings, start: int) -> FitReport:
    """Train with each learning rate and leave the run as the one with the least validation loss made it.

    The validation part is the end of the pool, which the fits then do without.
    """
    width = find_width(run, settings)
    run.data.extend(settings.steps * settings.batch_size * width)
    aside = set_aside(run.data.pool, width)
    names = {example.id for example in aside}
    rest = [example for example in run.data.train if example.id not in names]
    windows = [window for example in aside for window in cut(example, width)]
    number = sum(map(count_learned, windows))
    if number < LEAST or not rest:
        raise Unsupported(
            f"the train set is too small to try several learning rates: {number} tokens would be set aside "
            f"to choose by, of {LEAST} at least; give more text, or one lr"
        )
    losses: dict[str, float] = {}
    best: tuple[float, FitReport, Callable[[], None]] | None = None
    before = run.remember()
    with training_on(run, rest):
        for tried, lr in enumerate(settings.rates):
            before()
            try:
                with count_from(run, settings.steps * tried, settings.steps * len(settings.rates)):
                    report = train(run, dataclasses.replace(settings, lr=lr), start)
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
    return report | {"rates": rates, "validation_tokens": number}


def train(run: Run, settings: FitSettings, start: int) -> FitReport:
    """The loop of `fit`, at one learning rate."""
    plan = run.train
    model = run.model
    (lr,) = settings.rates
    width = find_width(run, settings)
    unread = run.data.extend((settings.steps - start) * settings.batch_size * width)
    examples, left_out = cut_all(run.data.train, width, unread)
    losses: list[float] = []
    tokens = 0
    drawn: set[int] = set()
    sampler = plan.slot("sampler") or Shuffled(len(examples), run.seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(training_on(run, examples))
        model.train()
        stack.callback(model.eval)
        for method in plan.chain("context"):
            stack.enter_context(method.context(run))
        groups = group_parameters(run, lr, settings.weight_decay)  # contexts may bring some and freeze others
        parameters = [parameter for group in groups for parameter in group["params"]]
        widened = stack.enter_context(widen(parameters))
        rounded = partial(torch.autocast, run.device.type, torch.bfloat16) if widened else contextlib.nullcontext
        precision = plan.slot("precision", rounded)
        owner = plan.slot("optimizer")
        optimizer = owner.optimizer(groups, run) if owner else torch.optim.AdamW(groups)
        for wrap in plan.chain("optimizer_wrap"):
            optimizer = wrap(optimizer)
        peak = [group["lr"] for group in optimizer.param_groups]
        trained = [describe_group(group) for group in groups]
        held = [(m, m.kept()) for m in model.modules() if isinstance(m, MaskedLinear)]
        for step in range(start):
            sampler.draw(step, settings.batch_size)
        for step in range(start, settings.steps):
            for group, top in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = top * rate(step, settings.steps, settings.warmup, settings.schedule)
            indices = sampler.draw(step, settings.batch_size)
            batch = collate([examples[i] for i in indices], run.pad, run.device)
            for method in plan.chain("batch"):
                batch = method.batch(batch, run)
            loss, terms = compute_loss(run, batch, precision)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss is {losses[-1]} at step {step + 1} of {settings.steps}")
            if hasattr(sampler, "seen"):
                sampler.seen(indices, terms)
            loss.backward()
            for module, mask in held:
                if module.weight.grad is not None:
                    module.weight.grad.mul_(mask)
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            for module, mask in held:
                module.weight.data.mul_(mask)
            for method in plan.chain("on_step"):
                method.on_step(run, step, settings.steps)
            run.progress("training step", step + 1, settings.steps)
            optimizer.zero_grad(set_to_none=True)
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
            drawn.update(indices)
    available = sum(map(count_learned, examples))
    report: FitReport = {
        "steps": settings.steps - start,
        "tokens": tokens,
        "distinct_tokens": sum(count_learned(examples[i]) for i in drawn),
        "available_tokens": available,
        "epochs": tokens / available,
        "lr": lr,
        "groups": trained,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    return report | {"left_out": left_out} if left_out else report


def find_width(run: Run, settings: FitSettings) -> int:
    """Tokens in a window of this fit, at most."""
    return min(settings.max_length, count_positions(run.model))


def cut_all(examples: Sequence[Example], width: int, unread: int) -> tuple[list[Example], str]:
    """The windows of all examples, and what could not be learned of them or lies in `unread` documents.

    Raises `Unsupported` where nothing is left.
    """
    windows: list[Example] = []
    lost: list[str] = []
    shortened = 0
    for example in examples:
        parts = cut(example, width)
        windows += parts
        lost += [] if parts else [example.id]
        shortened += bool(parts and example.prompt and len(example.ids) > width)
    shown = list_some(lost)
    if not windows:
        hint = f": {shown} leave nothing to learn in {width} tokens, give a larger max_length" if lost else " is empty"
        raise Unsupported(f"fit has nothing to train on: the train set{hint}")
    notes = {
        f"nothing to learn in {width} tokens of {shown}": lost,
        f"{shortened} answers cut at {width} tokens": shortened,
        f"{unread} documents more than needed": unread,
    }
    return windows, "; ".join(note for note, holds in notes.items() if holds)


@contextlib.contextmanager
def count_from(run: Run, before: int, total: int) -> Iterator[None]:
    """Have progress inside count on from `before`, of `total`."""
    tell = run.progress
    run.progress = lambda unit, done, _: tell(unit, before + done, total)
    try:
        yield
    finally:
        run.progress = tell


@contextlib.contextmanager
def training_on(run: Run, examples: list[Example]) -> Iterator[None]:
    """Have `run.data.train` hold these examples inside."""
    before = run.data.train
    run.data.train = examples
    try:
        yield
    finally:
        run.data.train = before


def set_aside(pool: Sequence[Example], width: int) -> list[Example]:
    """The validation part: the last examples of the pool, a tenth of it at most but never none."""
    chosen: list[Example] = []
    tokens = 0
    for example in reversed(pool[len(pool) - max(1, len(pool) // 10) :]):
        learned = sum(map(count_learned, cut(example, width)))
        if chosen and tokens + learned > VALIDATION:
            break
        if learned:
            chosen.append(example)
            tokens += learned
    return chosen


@torch.no_grad()
def measure_loss(run: Run, windows: Sequence[Example], batch_size: int) -> float:
    """Mean cross-entropy of the learned tokens, in nats. Raises `Diverged` where it is not finite."""
    total = 0.0
    for start in range(0, len(windows), batch_size):
        batch = collate(windows[start : start + batch_size], run.pad, run.device)
        labels = batch.pop("labels")
        logits = run.model(**batch, use_cache=False).logits
        total += float(cross_entropy(logits, labels, "sum"))
    loss = total / sum(map(count_learned, windows))
    if not math.isfinite(loss):
        raise Diverged("the validation loss is not finite")
    return loss


def compute_loss(
    run: Run, batch: dict[str, Tensor], precision: Callable[[], AbstractContextManager[Any]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all terms, and the terms."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with precision():  # of one forward pass: gradients have their own dtype
        out = run.model(**inputs, use_cache=False)
    terms: dict[str, Tensor] = {}
    for method in run.train.chain("loss"):
        terms |= method.loss(batch, out, run)
    if "hard" not in terms:
        terms["hard"] = cross_entropy(out.logits, batch["labels"])
    return torch.stack(list(terms.values())).sum(), terms


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Of the learned tokens, from logits [B, T, V] and labels [B, T], in nats."""
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction
    )


def rate(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Fraction of the peak learning rate at `step` (from 0): linear warm-up, then constant, linear or cosine."""
    start = warmup * steps
    if step < start:
        return (step + 1) / (start + 1)
    done = (step - start) / max(1.0, steps - start)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


class Shuffled:
    """Examples in a new random order each epoch; the default of the slot `sampler`."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._stream = self._indices()

    def _indices(self) -> Iterator[int]:
        epoch = 0
        while True:
            order = list(range(self.size))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            yield from order
            epoch += 1

    def draw(self, step: int, batch_size: int) -> list[int]:
        """Indices of the next batch."""
        return [next(self._stream) for _ in range(batch_size)]


def collate(examples: Sequence[Example], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Right-padded batch: `input_ids`, `attention_mask`, `labels` [B, T]; prompts and padding are not learned."""
    rows = [example.ids for example in examples]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, example.prompt : len(row)] = torch.tensor(row[example.prompt :])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
