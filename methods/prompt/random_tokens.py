"""Random tokens: the floor of all that choose which tokens of a prompt stay."""

from __future__ import annotations

import random
from dataclasses import dataclass

from effbench.core.kinds import Shorten
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import count_tokens, cut, find_budget, join


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
        if self.keep >= 1:
            return segments
        pieces = cut(segments, run.tokenizer)
        shortened = [i for i, piece in enumerate(pieces) if 2 <= piece.part < 2 + len(segments.contexts)]
        chance = random.Random(f"{run.seed}:{segments.text()}")
        drawn = sorted(shortened, key=lambda i: (not pieces[i].stays, chance.random()))
        budget = find_budget(self.keep, count_tokens(pieces[i] for i in shortened))
        kept = set(range(len(pieces))) - set(shortened)
        for i in drawn:
            budget -= len(pieces[i].ids)
            if budget < 0 and not pieces[i].stays:
                break
            kept.add(i)
        return join(segments, [pieces[i] for i in sorted(kept)])
