"""Near-duplicate texts: by MinHash signatures (Broder, 1997), or counted exactly."""

from __future__ import annotations

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence, Set

import numpy
from numpy.typing import NDArray

from effbench.sources.words import list_words

PRIME = (1 << 31) - 1  # of the hash functions h -> (a h + b) mod PRIME
SEED = 1

Signature = NDArray[numpy.uint64]


class Signatures:
    """Signatures of `permutations` numbers of the sets of word n-grams of texts.

    Two texts are compared if their signatures agree in all `rows` numbers of one of `bands` bands. So a pair with a
    Jaccard index of s is compared with probability 1 - (1 - s^rows)^bands.
    """

    def __init__(self, permutations: int = 128, words: int = 5, threshold: float = 0.7, recall: float = 0.9) -> None:
        chance = numpy.random.default_rng(SEED)
        self._factors = chance.integers(1, PRIME, permutations, dtype=numpy.uint64)
        self._offsets = chance.integers(0, PRIME, permutations, dtype=numpy.uint64)
        self._words = words
        self.rows = choose_rows(permutations, threshold, recall)
        self.bands = permutations // self.rows

    def shingle(self, words: Sequence[str]) -> frozenset[str]:
        """The n-grams of a text; the whole of it where it has fewer words."""
        last = max(1, len(words) - self._words + 1)
        return frozenset(" ".join(words[i : i + self._words]) for i in range(last))

    def sign(self, grams: Collection[str]) -> Signature:
        """The signature of a text with these n-grams."""
        hashes = numpy.fromiter((zlib.crc32(gram.encode()) % PRIME for gram in grams), numpy.uint64, len(grams))
        # Products stay below 2^62, and wrap round the prime often enough to lose all order of the hashes.
        values: Signature = ((self._factors[:, None] * hashes + self._offsets[:, None]) % numpy.uint64(PRIME)).min(1)
        return values

    def cut(self, signature: Signature) -> list[bytes]:
        """The bands of a signature, each with its number."""
        starts = range(0, self.bands * self.rows, self.rows)
        return [start.to_bytes(4) + signature[start : start + self.rows].tobytes() for start in starts]

    @staticmethod
    def compare(one: Signature, other: Signature) -> float:
        """Estimated Jaccard index."""
        return float((one == other).mean())


def find_recall(permutations: int, rows: int, jaccard: float) -> float:
    """How likely two texts of this Jaccard index share one of as many bands of `rows` numbers as there can be."""
    return 1.0 - (1.0 - jaccard**rows) ** (permutations // rows)


def choose_rows(permutations: int, threshold: float, recall: float) -> int:
    """Numbers in a band: the most that leave pairs at the threshold this likely to be compared, or 1.

    The more there are, the fewer pairs are compared in vain.
    """
    enough = (r for r in range(permutations, 0, -1) if find_recall(permutations, r, threshold) >= recall)
    return next(enough, 1)


def jaccard(one: Set[str], other: Set[str]) -> float:
    """Jaccard index of two sets that are not both empty."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def count_shared(texts: Iterable[str], others: Iterable[str], threshold: float = 0.7) -> int:
    """How many of `texts` have a near-duplicate among `others`: a Jaccard index of their words of `threshold` at least.

    Exact, by prefix filtering (Chaudhuri et al., 2006): sets that are so alike share one of their rarest words, and
    only such pairs are compared.
    """
    known = [frozenset(list_words(text)) for text in others]
    frequency = Counter(word for words in known for word in words)

    def rarest(words: frozenset[str]) -> list[str]:
        """As many as leave too few others for the threshold."""
        number = len(words) - math.ceil(threshold * len(words) - 1e-9) + 1
        return sorted(words, key=lambda word: (frequency[word], word))[:number]

    having: dict[str, list[frozenset[str]]] = defaultdict(list)
    for words in set(known):
        for word in rarest(words):
            having[word].append(words)

    def has_near(words: frozenset[str]) -> bool:
        near = (other for word in rarest(words) for other in having.get(word, ()))
        return any(len(words & other) >= threshold * len(words | other) for other in near)

    return sum(has_near(frozenset(list_words(text))) for text in texts)
