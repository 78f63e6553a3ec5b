"""Beam search through the caches of a plan, as transformers searches with `early_stopping=False`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effbench.nn.infer.memory import count_places

if TYPE_CHECKING:
    from effbench.nn.infer.engine import Engine
    from effbench.nn.infer.memory import Tokens


class Beams:
    """The texts of one prompt: those in the making, likeliest first, and the best of those that have ended."""

    def __init__(self, size: int, length_penalty: float) -> None:
        self.size, self.length_penalty = size, length_penalty
        self.texts: list[list[int]] = [[] for _ in range(size)]
        # Logarithms of their probabilities. In the beginning all are alike, and only one counts.
        self.scores = [0.0, *[-math.inf] * (size - 1)]
        self.ended: list[tuple[float, list[int]]] = []  # score and text

    def grow(self, ranked: Sequence[tuple[float, int, int]], stop_ids: set[int], last: bool) -> list[int]:
        """Take one token more, of candidates (score, beam, token), best first; the beams that go on, by their places.

        A text ends with a stop token, and the `last` token ends all, if it is among the best `size` candidates. What
        is no longer to be gone on with is an empty list.
        """
        length = len(self.texts[0]) + 1
        stay: list[tuple[float, int, list[int]]] = []
        for rank, (score, beam, token) in enumerate(ranked):
            stops = token in stop_ids
            if not stops and len(stay) < self.size:
                stay.append((score, beam, [*self.texts[beam], token]))
            if (stops or last) and rank < self.size and score > -math.inf:
                text = self.texts[beam] if stops else [*self.texts[beam], token]
                self.ended.append((score / length**self.length_penalty, text))
        self.ended = sorted(self.ended, key=lambda entry: -entry[0])[: self.size]
        full = len(self.ended) == self.size
        if last or not stay or (full and stay[0][0] / length**self.length_penalty <= self.ended[-1][0]):
            return []
        stay += [(-math.inf, *stay[0][1:])] * (self.size - len(stay))
        self.scores, self.texts = [score for score, _, _ in stay], [text for _, _, text in stay]
        return [beam for _, beam, _ in stay]

    @property
    def best(self) -> list[int]:
        """The text with the highest score, without its stop token."""
        return self.ended[0][1] if self.ended else []


def search(
    engine: Engine,
    prompts: Sequence[Tokens],
    beams: int,
    max_new_tokens: int,
    stop_ids: set[int],
    length_penalty: float = 1.0,
) -> list[list[int]]:
    """Continuations of the prompts, each ending before a stop token, with the highest score among those found.

    The score is the logarithm of the probability, in nats, of the text with its stop token, over its number of tokens
    to the power of `length_penalty`. The search of a prompt ends when `beams` texts have ended and no unfinished one,
    as long as it now is, has a higher score than the worst of them. Raises `Unsupported` where texts would be longer
    than the model's positions.
    """
    if not prompts or not max_new_tokens:
        return [[] for _ in prompts]
    engine.check_room(max(map(count_places, prompts)) + max_new_tokens)
    found = [Beams(beams, length_penalty) for _ in prompts]
    state, last = engine.read(prompts)
    uses = engine.read_uses
    live = list(range(len(prompts)))
    rows = torch.arange(len(prompts), device=engine.device).repeat_interleave(beams)
    state.select(rows)
    last = last[rows]
    for step in range(max_new_tokens):
        scores = torch.tensor([found[i].scores for i in live], device=engine.device)
        ranked = _rank(engine.head(last), scores, beams * (1 + max(1, len(stop_ids))))
        kept: list[int] = []
        going: list[int] = []
        for place, i in enumerate(live):
            stay = found[i].grow(ranked[place], stop_ids, step == max_new_tokens - 1)
            kept += [place * beams + beam for beam in stay]
            going += [i] if stay else []
        live = going
        if not live:
            break
        if kept != list(range(len(last))):
            state.select(torch.tensor(kept, device=engine.device))
        now = engine.note(state, [], [True] * len(kept))
        for place, i in enumerate(live):
            uses[i] = now[place * beams]
        ids = torch.tensor([[text[-1]] for i in live for text in found[i].texts], device=engine.device)
        last = engine.extend(state, ids).last_hidden_state[:, -1]
        engine.settle(state)
    engine.uses = uses
    return [beam.best for beam in found]


def _rank(logits: Tensor, scores: Tensor, count: int) -> list[list[tuple[float, int, int]]]:
    """Of each prompt the best candidates (score, beam, token), by logits [P B, V] and scores [P, B] of the beams."""
    total = (scores[..., None] + logits.log_softmax(-1).view(*scores.shape, -1)).flatten(1)
    best = total.topk(min(count, total.shape[1]))
    vocabulary = logits.shape[1]
    return [
        [(score, at // vocabulary, at % vocabulary) for score, at in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
