"""Attention transfer: each layer of the student attends as the teacher's does (TinyBERT, 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.method import Output
from effbench.core.run import Run
from effbench.methods.distill._layers import Examples, map_layers, widen


@dataclass(frozen=True)
class AttentionTransfer(Train):
    """L = beta sum_l 1/h sum_heads MSE(A_l, A_g(l)), A the scores before the softmax (equation 7 of the paper).

    A query of a real token looks at the real tokens up to itself, prompt too; the mean of an example is over those
    pairs, without those that a sliding window hides from either model, and an example counts by its learned tokens.
    With `probabilities` A is the softmax and errors are summed over pairs and heads, the squared Frobenius norm.
    A student of fewer heads follows means over as many groups of the teacher's neighbouring heads, one of more heads
    has groups that follow a head each. Adds its own term alone.
    """

    paper = "arXiv:1909.10351"
    caveats = ("the paper's models attend both ways and have as many heads; TinyBERT learns hidden states as well",)
    type = "distillation"
    weight_update = "training"
    tuned = {"beta": (0.1, 1.0)}
    trials = ({}, {"scores": "probabilities"})

    beta: float = 1.0  # weight of the term
    scores: Literal["logits", "probabilities"] = "logits"  # what is compared: before the softmax or after it
    layers: tuple[int, ...] | None = None  # teacher's block, from 0, for each of the student; None: at the same depth
    teacher: str = "reference"  # role of the teacher: the unchanged model, or the name of a snapshot

    def check(self) -> None:
        self.require(self.beta > 0, "beta must be above 0")
        self.require(self.layers is None or min(self.layers, default=-1) >= 0, "layers are numbers from 0 on")
        self.require(self.teacher != "model", "teacher='model' is the one that learns: it has nothing to teach itself")

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        output: Output = "scores" if self.scores == "logits" else "attention"
        return {"model": {output}, self.teacher: {output}}

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        examples = Examples(batch)
        name = "scores" if self.scores == "logits" else "attention"
        mine, theirs = (getattr(run.outputs(role), name) for role in ("model", self.teacher))
        total = torch.zeros((), device=batch["input_ids"].device)
        for layer, place in enumerate(map_layers(run, self.teacher, self.layers)):
            a, b = widen(mine[layer]), match_heads(widen(theirs[place]), mine[layer].shape[1])  # [B, Hq, T, T]
            seen = a.isfinite() & b.isfinite()  # scores are -inf where a query does not look
            error = torch.where(seen, a - b, 0.0).square().sum(3)  # [B, Hq, T]
            if self.scores == "logits":
                counts = seen.sum((1, 3))[examples.real].to(a.dtype)  # Hq of each pair
                value = examples.mean(examples.sum(error.sum(1)[examples.real]) / examples.sum(counts))
            else:
                value = examples.mean(examples.sum(error.sum(1)[examples.real]))
            run.watched[f"layer_{layer}"] = value
            total = total + value
        return {"attention": self.beta * total}


def match_heads(attention: Tensor, heads: int) -> Tensor:
    """Attention [B, H, T, T] of as many heads as the student has.

    Raises `Unsupported` where one number is no multiple of the other.
    """
    number = attention.shape[1]
    if number % heads and heads % number:
        raise Unsupported(f"the teacher has {number} heads, the student {heads}: one must be a multiple of the other")
    if number > heads:
        return attention.unflatten(1, (heads, -1)).mean(2)
    return attention.repeat_interleave(heads // number, 1)
