"""Retrieval: the contexts, or the sentences, that match the question best by BM25 (Robertson et al., 1994)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from effbench.core.errors import Refused
from effbench.core.kinds import Shorten
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import cut, find_budget

WORD = re.compile(r"\w+")
SENTENCE = re.compile(r".+?(?:[.!?][\"'”’)\]]*\s+|[。！？]\s*|\n\s*|\Z)", re.DOTALL)  # with the white space behind it


@dataclass(frozen=True)
class Retrieval(Shorten):
    """Units are ranked by BM25 against the question, and the best stay, in the order of the prompt, until the next has
    no room in the budget. A prompt whose best unit has no room is refused.

    The inverse document frequency is Lucene's, ln(1 + (N - n + 0.5) / (n + 0.5)) for a word in n of N units, which is
    positive for every word; Robertson's has no 1 in it and is negative for words in more than half of the units.
    """

    paper = "Robertson et al., 1994, Okapi at TREC-3"
    caveats = (
        "the paper ranks documents of a collection; frequencies are here those of the units of one prompt",
        "words are compared as they are, in lower case: no stemming, no stop words",
    )
    type = "prompt compression"
    identity = {"keep": 1.0}
    asks = True

    k1: float = 1.2  # how soon a repeated word counts no more; 0: at once
    b: float = 0.75  # how far long units are counted down, in [0, 1]
    unit: Literal["auto", "context", "sentence"] = "auto"  # what stays or goes; auto: contexts where there are several

    def check(self) -> None:
        super().check()
        self.require(self.k1 >= 0, "k1 must be at least 0")
        self.require(0 <= self.b <= 1, "b must be in [0, 1]")

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        whole = self.unit == "context" or (
            self.unit == "auto" and sum(bool(text.strip()) for text in segments.contexts) > 1
        )
        units = [  # (number of the context, text)
            (i, text)
            for i, context in enumerate(segments.contexts)
            for text in ([context] if whole else split_sentences(context))
        ]
        texts = [text for _, text in units]
        if self.keep >= 1 or not "".join(texts).strip():
            return segments
        sizes = [0] * len(units)
        for piece in cut(replace(segments, contexts=tuple(texts)), run.tokenizer):
            if 2 <= piece.part < 2 + len(units):
                sizes[piece.part - 2] += len(piece.ids)
        scores = score(texts, segments.question, self.k1, self.b)
        room = left = find_budget(self.keep, sum(sizes))
        kept: set[int] = set()
        for i in sorted(range(len(units)), key=lambda i: -scores[i]):  # equal ones in the order of the prompt
            left -= sizes[i]
            if left < 0:
                break
            kept.add(i)
        if not any(texts[i].strip() for i in kept):
            raise Refused(
                f"{self}: the {'context' if whole else 'sentence'} that matches best has more than {room} tokens"
            )
        stay = [
            "".join(text for j, (of, text) in enumerate(units) if of == i and j in kept)
            for i in range(len(segments.contexts))
        ]
        return segments.with_contexts(stay)


def split_sentences(text: str) -> list[str]:
    """Sentences and lines with the white space behind them; joined they are the text."""
    return SENTENCE.findall(text)


def score(units: Sequence[str], question: str, k1: float, b: float) -> list[float]:
    """BM25 of each unit: the sum over the words of the question, each as often as it is there, of

    idf(word) f (k1 + 1) / (f + k1 (1 - b + b length / mean length)), where f is how often the unit has the word.
    """
    bags = [Counter(WORD.findall(unit.lower())) for unit in units]
    lengths = [bag.total() for bag in bags]
    mean = sum(lengths) / max(1, len(lengths))
    scores = [0.0] * len(units)
    for word in WORD.findall(question.lower()):
        holding = sum(word in bag for bag in bags)
        idf = math.log(1 + (len(bags) - holding + 0.5) / (holding + 0.5))
        for i, (bag, length) in enumerate(zip(bags, lengths, strict=True)):
            if bag[word]:
                scores[i] += idf * bag[word] * (k1 + 1) / (bag[word] + k1 * (1 - b + b * length / mean))
    return scores
