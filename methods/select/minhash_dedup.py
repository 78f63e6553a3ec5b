"""MinHash deduplication: of examples that share most of their word sequences one stays (Lee et al., 2022)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.train.examples import list_words
from effbench.sources.duplicates import Signature, Signatures


@dataclass(frozen=True)
class MinHashDedup(Select):
    """Examples are taken from the best on; one whose estimated Jaccard index with one taken before reaches `threshold`
    is turned away, and the next of the ranking is looked at in its place.

    Signatures of word n-grams are cut into bands, and only examples that share a band are compared (appendix A of the
    paper).
    """

    paper = "arXiv:2107.06499"
    caveats = ("the paper hashes 9,000 times, for documents of the whole web, and compares by edit distance at last",)
    type = "data selection"

    threshold: float = 0.7  # Jaccard index from which on two examples count as one
    permutations: int = 128  # hash functions of a signature
    words: int = 5  # in an n-gram

    def check(self) -> None:
        super().check()
        self.require(0 < self.threshold <= 1, "threshold must be in (0, 1]")
        self.require(min(self.permutations, self.words) > 0, "permutations and words must be at least 1")

    def admit(self, examples: Sequence[Example], run: Run) -> Iterator[int]:
        signatures = Signatures(self.permutations, self.words, self.threshold)
        found: dict[bytes, list[int]] = defaultdict(list)
        taken: dict[int, Signature] = {}
        for place, example in enumerate(examples):
            signature = signatures.sign(list_words(run, example))
            keys = signatures.cut(signature)
            near = {other for key in keys for other in found[key]}
            if any(signatures.compare(signature, taken[other]) >= self.threshold for other in near):
                continue
            taken[place] = signature
            for key in keys:
                found[key].append(place)
            yield place
