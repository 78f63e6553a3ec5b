"""Random tokens: the floor of all that choose which tokens of a prompt stay."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from effbench.core.kinds import Shorten
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import Piece, count_tokens, cut, is_context, join, measure_room, round_down


@dataclass(frozen=True)
class RandomTokens(Shorten):
    """Tokens of the contexts are drawn uniformly, without replacement, until the next has no room in the budget.

    What is drawn depends on the seed and the prompt alone, and a larger `keep` draws further in the same order. The
    white space behind a context stays with it, and the last token of the prompt stays.
    """

    paper = "unpublished"
    caveats = ("tokens of one character are drawn together",)
    type = "prompt compression"
    identity = {"keep": 1.0}

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1 or not "".join(segments.contexts).strip():
            return segments
        pieces = cut(segments, run.tokenizer)
        return draw(segments, pieces, round_down(measure_room(self, segments, pieces)[0]), run.seed)


def drop(segments: Segments, tokens: int, run: Run) -> Segments:
    """A prompt without so many tokens of its contexts, drawn as the method does, or without any of them."""
    pieces = cut(segments, run.tokenizer)
    size = count_tokens(piece for piece in pieces if is_context(piece, segments))
    return draw(segments, pieces, max(0, size - tokens), run.seed) if tokens > 0 else segments


def draw(segments: Segments, pieces: Sequence[Piece], budget: int, seed: int) -> Segments:
    """A prompt that has so many tokens of its contexts."""
    shortened = [i for i, piece in enumerate(pieces) if is_context(piece, segments)]
    chance = random.Random(f"{seed}:{segments.text()}")
    drawn = sorted(shortened, key=lambda i: (not pieces[i].stays, chance.random()))
    kept = set(range(len(pieces))) - set(shortened)
    for i in drawn:
        budget -= len(pieces[i].ids)
        if budget < 0 and not pieces[i].stays:
            break
        kept.add(i)
    return join(segments, [pieces[i] for i in sorted(kept)])
