"""Texts that a student writes, or student and teacher together, with what both think of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.mixture import Mixture
from effbench.nn.model.feed import feed
from effbench.nn.train.batches import IGNORED, Batch, collate
from effbench.nn.train.loss import learned, learned_logits
from effbench.nn.train.samples import Asked, answer, sample
from effbench.nn.train.teacher import count_shared
from effbench.nn.train.windows import evaluating


class Rollout(TypedDict):
    """A text of n tokens behind a prompt; plain, so that it may lie in the state of a method."""

    ids: list[int]
    student: Tensor  # [n] logarithms of the probabilities that the student gave them
    teacher: Tensor  # and the teacher


def roll_out(
    run: Run,
    role: str,
    examples: Sequence[Example],
    asked: Sequence[Asked],
    new_tokens: int,
    temperature: float,
    mix: float,
) -> list[Rollout]:
    """Texts drawn from (1 - mix) of the student and mix of the teacher, at every token; all softmaxes over a
    temperature, and over the tokens of both."""
    shared, models = count_shared(run, role), (run.model, run.role(role))
    student, teacher = (open_engine(run, model, shared) for model in models)
    engine = Mixture(student, teacher, mix, temperature) if mix else student
    texts = sample(run, engine, asked, new_tokens, temperature)
    batch = collate([answer(*one) for one in zip(examples, asked, texts, strict=True)], run.pad, run.device)
    tokens = batch["labels"][:, 1:][learned(batch)]
    with torch.no_grad(), evaluating(run.model):
        logits = [learned_logits(feed(model, batch).logits[..., :shared], batch) / temperature for model in models]
    logprobs = (each.log_softmax(-1).gather(1, tokens[:, None])[:, 0].cpu() for each in logits)
    parts = zip(*(each.split([len(text) for text in texts]) for each in logprobs), strict=True)
    return [Rollout(ids=list(text), student=q, teacher=p) for text, (q, p) in zip(texts, parts, strict=True)]


def lay_out(
    run: Run, written: Sequence[Example], data: Sequence[Example], numbers: Mapping[str, Sequence[Tensor]]
) -> Batch:
    """Rows of written texts, and behind them those of the data that they were written for.

    `text` [B, T] is where a token is of a written text; there `numbers` lie by name, [n] of each text.
    """
    batch = collate([*written, *data], run.pad, run.device)
    text = (batch["example"] >= 0) & (batch["example"] < len(written))
    for name, values in numbers.items():
        joined = torch.cat([*values]).to(text.device)
        batch[name] = torch.zeros(text.shape, dtype=joined.dtype, device=text.device)
        batch[name][text & (batch["labels"] != IGNORED)] = joined
    example = torch.where(batch["example"] < 0, -1, batch["example"] % len(data))
    return batch | {"text": text, "example": example}
