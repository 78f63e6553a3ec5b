"""DSIR: examples are resampled by how much likelier their n-grams are in the target (Xie et al., 2023)."""

from __future__ import annotations

import functools
import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._target import Aimed
from effbench.nn.train.examples import spell
from effbench.sources.words import list_words

WORDS = re.compile(r"\w+|[^\w\s]+")  # runs of letters and digits, and runs of punctuation
SMOOTHING = 1e-8  # is added to each probability before its logarithm is taken, in the authors' code


@dataclass(frozen=True)
class DSIR(Aimed):
    """A sample without replacement by importance weights w = p(z) / q(z) of features z, of which p is fitted on the
    target and q on the pool (section 3).

    z counts an example's n-grams by hash bucket, and both p and q are bags of n-grams: log w = z . (log p - log q)
    (section 4). Adding Gumbel noise to log w and taking the largest samples by w without replacement.
    """

    paper = "arXiv:2302.03169"
    caveats = (
        "the paper's documents are cut to equal lengths, and those under 100 words are dropped; here all are weighed, "
        "and long ones have extreme weights",
        "the authors' code takes a run of letters for one word, a whole clause in a script without spaces; here each "
        "two neighbouring letters of such",
    )
    type = "data selection"
    usual = 0.2
    trials = ({}, {"ngrams": 1})

    ngrams: int = 2  # words in an n-gram, at most; shorter ones count, too
    buckets: int = 10_000  # that n-grams are hashed into

    def check(self) -> None:
        super().check()
        self.require(min(self.ngrams, self.buckets) > 0, "ngrams and buckets must be at least 1")

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        chance = torch.Generator().manual_seed(zlib.crc32(f"{run.seed}/dsir".encode()))
        uniform = torch.rand(len(examples), generator=chance, dtype=torch.float64)
        return self.weigh_up(examples, run) - (-uniform.clamp(min=1e-300).log()).log()  # plus Gumbel noise

    def weigh_up(self, examples: Sequence[Example], run: Run) -> Tensor:
        """[N] float64: log w of each example."""
        target = [self.hash_text(spell(run, example)) for example in self.find_target(run)]
        pool = [self.hash_text(spell(run, example)) for example in examples]
        ratio = self._fit(target) - self._fit(pool)
        return torch.stack([ratio[each].sum() for each in pool])

    def hash_text(self, text: str) -> Tensor:
        """The buckets of all n-grams of a text, each as often as it is there."""
        words = list_words(" ".join(WORDS.findall(text.lower())))
        grams = [" ".join(words[i : i + n]) for n in range(1, self.ngrams + 1) for i in range(len(words) - n + 1)]
        return torch.tensor([find_bucket(gram, self.buckets) for gram in grams], dtype=torch.long)

    def _fit(self, texts: Sequence[Tensor]) -> Tensor:
        """[buckets] float64: the logarithm of the share that each bucket has of all n-grams."""
        counts = torch.bincount(torch.cat([*texts]), minlength=self.buckets).double()
        return (counts / counts.sum().clamp(min=1) + SMOOTHING).log()


@functools.lru_cache(maxsize=2**18)
def find_bucket(gram: str, buckets: int) -> int:
    """The bucket that an n-gram is hashed into."""
    return int.from_bytes(hashlib.sha256(gram.encode()).digest()) % buckets
