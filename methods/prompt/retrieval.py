"""Retrieval: contexts or sentences that match the question best, by BM25 (Robertson et al., 1994) or embeddings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import regex

from effbench.core.kinds import Shorten
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._units import compare, cut_units, keep_best
from effbench.nn.embedders import list_files
from effbench.sources.words import list_words

WORD = regex.compile(r"\w+")  # letters with their marks, and digits
BM25 = "bm25"


@dataclass(frozen=True)
class Retrieval(Shorten):
    """Units are ranked against the question; the best that have room in the budget stay, in the order of the prompt.

    The inverse document frequency is Lucene's, ln(1 + (N - n + 0.5) / (n + 0.5)) for a word in n of N units, which is
    positive for every word. Robertson's has no 1 in it and is negative for words in more than half of the units; with
    `idf="okapi"` such words count a quarter of the mean of all words, as in the package rank-bm25.
    """

    paper = "Robertson et al., 1994, Okapi at TREC-3"
    caveats = (
        "the paper ranks documents of a collection; frequencies are here those of the units of one prompt",
        "words are compared as they are, in lower case: no stemming, no stop words",
    )
    type = "prompt compression"
    identity = {"keep": 1.0}
    asks = True
    tuned = {"by": (BM25, "model", "all-minilm-l6-v2")}

    k1: float = 1.2  # how soon a repeated word counts no more; 0: at once
    b: float = 0.75  # how far long units are counted down, in [0, 1]
    idf: Literal["lucene", "okapi"] = "lucene"  # inverse document frequency
    unit: Literal["auto", "context", "sentence"] = "auto"  # what stays or goes; auto: contexts where there are several
    by: str = BM25  # or, by cosine, what embeds: model (its states), all-minilm-l6-v2 or a folder as in extractive

    def check(self) -> None:
        super().check()
        self.require(self.k1 >= 0, "k1 must be at least 0")
        self.require(0 <= self.b <= 1, "b must be in [0, 1]")

    def files(self) -> tuple[Path, ...]:
        return () if self.by == BM25 else list_files(self.by)

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1 or not "".join(segments.contexts).strip():
            return segments
        several = sum(bool(text.strip()) for text in segments.contexts) > 1
        unit = self.unit if self.unit != "auto" else "context" if several else "sentence"
        units = cut_units(segments, unit)
        if self.by == BM25:
            scores = score([text for _, text in units], segments.question, self.k1, self.b, self.idf)
        else:
            scores = compare(run, self, units, segments.question, self.by)
        return keep_best(self, segments, run.tokenizer, units, scores)


def score(units: Sequence[str], question: str, k1: float, b: float, kind: str = "lucene") -> list[float]:
    """BM25 of each unit: the sum over the words of the question, each as often as it is there, of

    idf(word) f (k1 + 1) / (f + k1 (1 - b + b length / mean length)), where f is how often the unit has the word.
    """
    bags = [Counter(list_terms(unit)) for unit in units]
    lengths = [bag.total() for bag in bags]
    mean = sum(lengths) / max(1, len(lengths))
    idf = weigh(bags, kind)
    scores = [0.0] * len(units)
    for word in list_terms(question):
        for i, (bag, length) in enumerate(zip(bags, lengths, strict=True)):
            if bag[word]:
                scores[i] += idf[word] * bag[word] * (k1 + 1) / (bag[word] + k1 * (1 - b + b * length / mean))
    return scores


def list_terms(text: str) -> list[str]:
    """The words of a text without punctuation, in lower case."""
    return list_words(" ".join(WORD.findall(text.lower())))


def weigh(bags: Sequence[Counter[str]], kind: str) -> dict[str, float]:
    """The inverse document frequency of each word."""
    held = Counter(word for bag in bags for word in bag)
    odds = {word: (len(bags) - number + 0.5) / (number + 0.5) for word, number in held.items()}
    if kind == "lucene":
        return {word: math.log(1 + value) for word, value in odds.items()}
    idf = {word: math.log(value) for word, value in odds.items()}
    least = 0.25 * sum(idf.values()) / max(1, len(idf))
    return {word: least if value < 0 else value for word, value in idf.items()}
