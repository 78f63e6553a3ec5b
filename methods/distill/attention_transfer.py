"""Attention transfer: each layer of the student attends as the teacher's does (TinyBERT, 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.method import Output
from effbench.core.run import Run
from effbench.methods.distill._layers import ByLayer, Examples
from effbench.nn.precision import widen


@dataclass(frozen=True)
class AttentionTransfer(ByLayer):
    """L = beta sum_l 1/h sum_heads MSE(A_l, A_g(l)), A the scores before the softmax (equation 7 of the paper).

    A query of a real token looks at the real tokens up to itself, prompt too; the mean of an example is over those
    pairs, without those that a sliding window hides from either model, and an example counts by its learned tokens.
    With `probabilities` A is the softmax and errors are summed over pairs and heads, the squared Frobenius norm.
    A student of fewer heads follows means over as many groups of the teacher's neighbouring heads, one of more heads
    has groups that follow a head each. Adds its own term alone.
    """

    paper = "arXiv:1909.10351"
    caveats = ("the paper's models attend both ways and have as many heads; TinyBERT learns hidden states as well",)
    trials = ({}, {"scores": "probabilities"})

    scores: Literal["logits", "probabilities"] = "logits"  # what is compared: before the softmax or after it

    @property
    def output(self) -> Literal["scores", "attention"]:
        """What it reads of both models."""
        return "scores" if self.scores == "logits" else "attention"

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {"model": {self.output}, self.teacher: {self.output}}

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        examples = Examples(batch)
        mine, theirs = (getattr(run.outputs(role), self.output) for role in ("model", self.teacher))
        errors = []
        for own, place in zip(mine, self.map_layers(run), strict=True):
            a, b = widen(own), match_heads(widen(theirs[place]), own.shape[1])  # [B, Hq, T, T]
            seen = a.isfinite() & b.isfinite()  # scores are -inf where a query does not look
            error = examples.sum(torch.where(seen, a - b, 0.0).square().sum((1, 3))[examples.real])
            if self.scores == "logits":
                error = error / examples.sum(seen.sum((1, 3))[examples.real].to(a.dtype))  # Hq of each pair
            errors.append(examples.mean(error))
        return {"attention": self.weigh(errors, run)}


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
