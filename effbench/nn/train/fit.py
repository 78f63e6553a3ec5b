"""The one training loop. Every hook of the train plan stands here in its place:

context                              around everything
    param_groups                     of the optimizer
    optimizer, optimizer_wrap        AdamW where the slot `optimizer` is empty
    for each step:
        draw (slot sampler), batch   examples to tensors
        forward (slot precision)     in a context of its own, if there is one
        loss                         named terms; cross-entropy only if none is called `hard`
        backward, clip, optimizer step
        weights held at zero are zeroed again
        on_step                      after the step, before gradients are cleared
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from effbench.core.errors import Diverged, Unsupported
from effbench.core.run import FitReport
from effbench.core.views import Example
from effbench.nn.model.linear import MaskedLinear

if TYPE_CHECKING:
    from effbench.core.run import Run

IGNORED = -100  # label of a token that is not learned


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """The hyper-parameters of a fit."""

    steps: int = 200  # of the optimizer
    lr: float = 1e-4  # peak of the learning rate
    batch_size: int = 8  # examples per step
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the learning rate after the warm-up
    warmup: float = 0.03  # fraction of the steps
    clip: float | None = 1.0  # largest gradient norm
    weight_decay: float = 0.0  # of AdamW, on every trained parameter
    max_length: int = 512  # tokens of an example


def fit(run: Run, settings: FitSettings, start: int = 0) -> FitReport:
    """Train what is trainable by the train plan, use the plan up, write in the log what happened and return it.

    The first `start` steps count as taken: the data and the learning rate go on from there. Raises `Unsupported` when
    nothing is trainable, `Diverged` on a loss that is not finite.
    """
    try:
        report = train(run, settings, start)
    finally:
        run.train.close()
    run.note_fit(report)
    return report


def train(run: Run, settings: FitSettings, start: int) -> FitReport:
    """The loop of `fit`."""
    plan = run.train
    model = run.model
    examples = run.data.train
    if not examples:
        raise Unsupported("fit has nothing to train on: the train set is empty")
    losses: list[float] = []
    tokens = 0
    sampler = plan.slot("sampler") or Shuffled(len(examples), run.seed)
    with contextlib.ExitStack() as stack:
        model.train()
        stack.callback(model.eval)
        for method in plan.chain("context"):
            stack.enter_context(method.context(run))
        parameters = [p for p in model.parameters() if p.requires_grad]  # contexts may bring some and freeze others
        if not parameters:
            raise Unsupported("fit has nothing to train: every parameter is frozen or packed")
        groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": settings.lr, "weight_decay": settings.weight_decay}
        ]
        for method in plan.chain("param_groups"):
            groups = method.param_groups(groups, run)
        owner = plan.slot("optimizer")
        optimizer = owner.optimizer(groups, run) if owner else torch.optim.AdamW(groups)
        for wrap in plan.chain("optimizer_wrap"):
            optimizer = wrap(optimizer)
        peak = [group["lr"] for group in optimizer.param_groups]
        held = [(m, m.kept()) for m in model.modules() if isinstance(m, MaskedLinear)]
        for step in range(start):
            sampler.draw(step, settings.batch_size)
        for step in range(start, settings.steps):
            for group, top in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = top * rate(step, settings.steps, settings.warmup, settings.schedule)
            indices = sampler.draw(step, settings.batch_size)
            batch = collate([examples[i] for i in indices], settings.max_length, run.pad, run.device)
            for method in plan.chain("batch"):
                batch = method.batch(batch, run)
            loss, terms = compute_loss(run, batch)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss is {losses[-1]} at step {step + 1} of {settings.steps}")
            if hasattr(sampler, "seen"):
                sampler.seen(indices, terms)
            loss.backward()
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            for module, mask in held:
                module.weight.data.mul_(mask)
            for method in plan.chain("on_step"):
                method.on_step(run, step, settings.steps)
            optimizer.zero_grad(set_to_none=True)
            tokens += int((batch["labels"] != IGNORED).sum())
    return {"steps": settings.steps - start, "tokens": tokens, "loss_first": losses[0], "loss_last": losses[-1]}


def compute_loss(run: Run, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all terms, and the terms."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with run.train.slot("precision", contextlib.nullcontext)():  # of one forward pass: gradients have their own dtype
        out = run.model(**inputs, use_cache=False)
    terms: dict[str, Tensor] = {}
    for method in run.train.chain("loss"):
        terms |= method.loss(batch, out, run)
    if "hard" not in terms:
        terms["hard"] = nn.functional.cross_entropy(
            out.logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
        )
    return torch.stack(list(terms.values())).sum(), terms


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


def collate(examples: Sequence[Example], max_length: int, pad: int, device: torch.device) -> dict[str, Tensor]:
    """Right-padded batch: `input_ids`, `attention_mask`, `labels` [B, T]; prompts and padding are not learned."""
    rows = [example.ids[:max_length] for example in examples]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, example.prompt : len(row)] = torch.tensor(row[example.prompt :])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
