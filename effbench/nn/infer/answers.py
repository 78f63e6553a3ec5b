"""How far a model's answers are from those to the unchanged prompt, read from the unchanged cache.

The plain model answers greedily. Then both read that answer, token by token, and what they would have said at each of
its places is compared: a number that also prompts without a right answer have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from effbench.nn.infer.engine import Engine
    from effbench.nn.infer.memory import Tokens

ANSWER = 8  # tokens of an answer that are compared


def divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference || model) of logits [N, V], in nats [N]."""
    p, q = reference.float().log_softmax(-1), model.float().log_softmax(-1)
    # where p is 0 the term is 0, even against q = 0
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).double()


def answer_kl(
    plain: Engine,
    changed: Engine,
    before: Sequence[Tokens],
    after: Sequence[Tokens],
    stops: set[int],
    hold: Sequence[int] | None = None,
    tokens: int = ANSWER,
) -> list[float]:
    """Divergence of each answer, in nats a token, from prompts `before` read by `plain` to those `after` by `changed`.

    `hold` is that of `Engine.score`, of the prompts after. An answer that ends at once is compared where it ends.
    """
    answers = plain.generate(before, tokens, stops)
    end = min(stops, default=0)
    answers = [answer if len(answer) == tokens else [*answer, end] for answer in answers]
    ours = changed.predict([*zip(after, answers, strict=True)], hold=hold)
    theirs = plain.predict([*zip(before, answers, strict=True)])
    return [float(divergence(p, q).mean()) for p, q in zip(theirs, ours, strict=True)]
