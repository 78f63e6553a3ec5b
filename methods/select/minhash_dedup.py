"""MinHash deduplication: of examples that share most of their word sequences one stays (Lee et al., 2022)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.train.examples import list_words
from effbench.sources.duplicates import Signatures, find_recall, jaccard


@dataclass(frozen=True)
class MinHashDedup(Select):
    """Examples are taken from the best on; one whose Jaccard index with one taken before reaches `threshold` is turned
    away, and the next of the ranking is looked at in its place.

    Signatures of word n-grams are cut into bands, and only examples that share a band are compared, exactly, by their
    n-grams (appendix A of the paper). What was turned away turns nobody away: of a chain A-B-C in which A and C differ,
    both stay where A is ranked before B.
    """

    paper = "arXiv:2107.06499"
    caveats = (
        "the paper hashes 9,000 times, for documents of the whole web, and compares by edit distance at last",
        "the paper keeps one of each connected component, here one that is near none that stays",
    )
    type = "data selection"

    threshold: float = 0.7  # Jaccard index from which on two examples count as one
    permutations: int = 128  # hash functions of a signature
    words: int = 5  # in an n-gram; a text of fewer is one; in a script without spaces each two letters are a word
    recall: float = 0.9  # how likely a pair at the threshold is to be compared, at least

    def check(self) -> None:
        super().check()
        self.require(0 < self.threshold <= 1, "threshold must be in (0, 1]")
        self.require(min(self.permutations, self.words) > 0, "permutations and words must be at least 1")
        reached = find_recall(self.permutations, 1, self.threshold)
        self.require(
            0 < self.recall <= reached, f"recall must be above 0, and with these hash functions at most {reached}"
        )

    def admit(self, examples: Sequence[Example], run: Run) -> Iterator[int]:
        signatures = Signatures(self.permutations, self.words, self.threshold, self.recall)
        found: dict[bytes, list[int]] = defaultdict(list)
        taken: dict[int, frozenset[str]] = {}
        run.log.notes[self.label] = {
            "bands": signatures.bands,
            "rows": signatures.rows,
            "recall at the threshold": find_recall(self.permutations, signatures.rows, self.threshold),
        }
        for place, example in enumerate(examples):
            grams = signatures.shingle(list_words(run, example))
            keys = signatures.cut(signatures.sign(grams))
            near = {other for key in keys for other in found[key]}
            if any(jaccard(grams, taken[other]) >= self.threshold for other in near):
                continue
            taken[place] = grams
            for key in keys:
                found[key].append(place)
            yield place
