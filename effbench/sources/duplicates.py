"""Near-duplicate texts: by MinHash signatures (Broder, 1997), or counted exactly."""

from __future__ import annotations

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy
from numpy.typing import NDArray

PRIME = (1 << 31) - 1  # of the hash functions h -> (a h + b) mod PRIME
SEED = 1

Signature = NDArray[numpy.uint64]


class Signatures:
    """Signatures of `permutations` numbers of the sets of word n-grams of texts.

    The share of equal numbers of two signatures estimates the Jaccard index of their sets. Bands are as many as make a
    pair at `threshold` share one with the best balance of misses and false alarms.
    """

    def __init__(self, permutations: int = 128, words: int = 5, threshold: float = 0.7) -> None:
        chance = numpy.random.default_rng(SEED)
        self._factors = chance.integers(1, PRIME, permutations, dtype=numpy.uint64)
        self._offsets = chance.integers(0, PRIME, permutations, dtype=numpy.uint64)
        self._words = words
        self._rows = choose_rows(permutations, threshold)

    def sign(self, words: Sequence[str]) -> Signature:
        """The signature of a text."""
        grams = {" ".join(words[i : i + self._words]) for i in range(max(1, len(words) - self._words + 1))}
        hashes = numpy.fromiter((zlib.crc32(gram.encode()) % PRIME for gram in grams), numpy.uint64, len(grams))
        # Products stay below 2^62, and wrap round the prime often enough to lose all order of the hashes.
        values: Signature = ((self._factors[:, None] * hashes + self._offsets[:, None]) % numpy.uint64(PRIME)).min(1)
        return values

    def cut(self, signature: Signature) -> list[bytes]:
        """The bands of a signature, each with its number."""
        starts = range(0, len(signature) - self._rows + 1, self._rows)
        return [start.to_bytes(4) + signature[start : start + self._rows].tobytes() for start in starts]

    @staticmethod
    def compare(one: Signature, other: Signature) -> float:
        """Estimated Jaccard index."""
        return float((one == other).mean())


def choose_rows(permutations: int, threshold: float) -> int:
    """Numbers in a band: with r of them in each of b bands, pairs at (1 / b)^(1 / r) share a band half of the time."""
    return min(
        range(1, permutations + 1), key=lambda rows: abs((rows / permutations) ** (1 / rows) - threshold), default=1
    )


def count_shared(texts: Iterable[str], others: Iterable[str], threshold: float = 0.7) -> int:
    """How many of `texts` have a near-duplicate among `others`: a Jaccard index of their words of `threshold` at least.

    Exact, by prefix filtering (Chaudhuri et al., 2006): sets that are so alike share one of their rarest words, and
    only such pairs are compared.
    """
    known = [frozenset(text.split()) for text in others]
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

    return sum(has_near(frozenset(text.split())) for text in texts)
