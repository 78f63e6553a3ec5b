"""Diversity by clusters: every k-means cluster of the embedded pool keeps its share of what is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._diverse import score_places, spread
from effbench.nn.embedders import list_files
from effbench.nn.train.embeddings import cluster, embed


@dataclass(frozen=True)
class KMeansDiversity(Select):
    """Examples are drawn at random from each cluster in proportion to its size.

    Embed, cluster, then sample proportionally; what is ranked behind goes on in the same proportions.
    """

    paper = "arXiv:1708.00489"
    caveats = (
        "the paper chooses greedily k centres that cover the pool; here k-means, and a random sample of each cluster",
    )
    type = "data selection"
    usual = 0.2
    tuned = {"clusters": (8, 16, 64)}

    clusters: int = 16  # of k-means
    by: str = "model"  # what embeds: the model itself, all-minilm-l6-v2, or a folder of sentence-transformers

    def check(self) -> None:
        super().check()
        self.require(self.clusters >= 1, "clusters must be at least 1")

    def files(self) -> tuple[Path, ...]:
        return list_files(self.by)

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        labels, _ = cluster(embed(run, examples, self.by), self.clusters, run.seed)
        chance = torch.Generator().manual_seed(run.seed)
        return score_places(spread(labels, torch.randperm(len(labels), generator=chance)))
