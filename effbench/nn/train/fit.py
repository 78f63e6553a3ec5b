"""The one training loop. Every hook of the train plan stands here in its place:

context                              around everything
    param_groups, optimizer, optimizer_wrap
    for each step:
        draw (slot sampler), batch   examples to tensors
        forward, loss                named terms; cross-entropy only if none is called `hard`
        backward, clip, optimizer step
        weights held at zero are zeroed again
        on_step                      after the step, before gradients are cleared
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effbench.core.errors import Diverged, Unsupported
from effbench.nn.data import Example
from effbench.nn.model.linear import MaskedLinear

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

IGNORED = -100  # label of a token that is not learned


def fit(
    run: ModelRun,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    warmup: float,
    clip: float | None,
    weight_decay: float,
    schedule: str,
    max_length: int,
    start: int = 0,
) -> dict[str, Any]:
    """Train what is trainable by the train plan. Raises `Unsupported` when nothing is, `Diverged` on a loss that is
    not finite. Returns the loss at the start and at the end, the steps taken and the tokens seen.

    The first `start` of the `steps` count as taken: the data and the learning rate go on from there.
    """
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
        groups: list[dict[str, Any]] = [{"params": parameters, "lr": lr, "weight_decay": weight_decay}]
        for method in plan.chain("param_groups"):
            groups = method.param_groups(groups, run)
        owner = plan.slot("optimizer")
        optimizer = owner.optimizer(groups, run) if owner else torch.optim.AdamW(groups)
        for wrap in plan.chain("optimizer_wrap"):
            optimizer = wrap(optimizer)
        peak = [group["lr"] for group in optimizer.param_groups]
        held = [(m, m.kept()) for m in model.modules() if isinstance(m, MaskedLinear)]
        for step in range(start):
            sampler.draw(step, batch_size)
        for step in range(start, steps):
            for group, top in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = top * rate(step, steps, warmup, schedule)
            indices = sampler.draw(step, batch_size)
            batch = collate([examples[i] for i in indices], max_length, run.pad, run.device)
            for method in plan.chain("batch"):
                batch = method.batch(batch, run)
            loss, terms = _loss(run, batch)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss is {losses[-1]} at step {step + 1} of {steps}")
            if hasattr(sampler, "seen"):
                sampler.seen(indices, terms)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            for module, mask in held:
                module.weight.data.mul_(mask)
            for method in plan.chain("on_step"):
                method.on_step(run, step, steps)
            optimizer.zero_grad(set_to_none=True)
            tokens += int((batch["labels"] != IGNORED).sum())
    return {"steps": steps - start, "tokens": tokens, "loss_first": losses[0], "loss_last": losses[-1]}


def _loss(run: ModelRun, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all terms, and the terms."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
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
