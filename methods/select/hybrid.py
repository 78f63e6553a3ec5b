"""Several criteria at once: a set that stands for the pool and whose examples are good ones (Lin & Bilmes, 2011)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from effbench import ops
from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._diverse import score_places, spread
from effbench.methods.select._kdpp import build_kernel, rank
from effbench.methods.select._quality import even_out, rate_coherence, rate_form, rate_perplexity
from effbench.nn.embedders import list_files
from effbench.nn.train.embeddings import cluster, embed
from effbench.nn.train.passes import score_losses

ROWS = 1024  # of similarities at a time


@dataclass(frozen=True)
class Hybrid(Select):
    """F(S) = coverage * L(S) + (1 - coverage) * R(S), equation 2 of the paper, maximised greedily.

    L is facility location: the mean similarity of an example of the pool to the nearest one in S. R is the sum of the
    scores in S. Both are 1 for the whole pool. A score is the weighted mean of quality (perplexity, form and
    coherence), diversity (distance from the centre of its cluster) and difficulty (loss), each as ranks in [0, 1].
    """

    paper = "https://aclanthology.org/P11-1052"
    caveats = (
        "the paper summarises documents; the criteria and their sum are those of data selection",
        "R is a plain sum, where the paper's has a square root for each cluster",
        "form is a share of rules of print, no grammar",
    )
    type = "data selection"
    usual = 0.2
    tuned = {"coverage": (0.25, 0.5, 0.75, 1.0)}
    trials = ({}, {"second": "kmeans"}, {"second": "dpp"}, {"coverage": 1.0})

    coverage: float = 0.5  # weight of facility location, in [0, 1]; the rest is that of the scores
    quality: float = 0.5  # weight in the scores; less than that of difficulty, and noise, which is hard, is kept
    diversity: float = 0.25  # weight in the scores
    difficulty: float = 0.25  # weight in the scores
    clusters: int = 16  # of k-means, for diversity and for the second stage
    second: Literal["none", "kmeans", "dpp"] = "none"  # what chooses in the end among the best: proportional sampling
    # from clusters, or a determinantal process
    candidates: float = 2.0  # times as many as are kept, that the second stage chooses among
    by: str = "model"  # what embeds: the model itself, all-minilm-l6-v2, or a folder of sentence-transformers

    def check(self) -> None:
        super().check()
        self.require(0 <= self.coverage <= 1, "coverage must be in [0, 1]")
        weights = (self.quality, self.diversity, self.difficulty)
        self.require(min(weights) >= 0 and max(weights) > 0, "weights must be at least 0, and one more than that")
        self.require(self.clusters >= 1, "clusters must be at least 1")
        self.require(self.candidates >= 1, "candidates must be at least 1")

    def files(self) -> tuple[Path, ...]:
        return list_files(self.by)

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        embeddings = embed(run, examples, self.by)
        scores = torch.ones(len(examples), dtype=torch.float64)
        if self.coverage < 1:
            scores = self._rate(examples, embeddings, run)
        places = torch.tensor(maximise(embeddings.to(run.device), scores.tolist(), self.coverage))
        number = min(len(places), round(self.candidates * self.count(run)))
        best, rest = places[:number], places[number:]
        if self.second == "kmeans":
            best = best[spread(cluster(embeddings[best], self.clusters, run.seed)[0], torch.arange(number))]
        elif self.second == "dpp":
            kernel = build_kernel(embeddings[best], "gaussian", (scores[best] / 2).exp())
            best = best[rank(kernel, self.count(run), "sample", run.seed)]
        return score_places(torch.cat([best, rest]))

    def _rate(self, examples: Sequence[Example], embeddings: Tensor, run: Run) -> Tensor:
        """The score of each example [N], in [0, 1]."""
        losses = score_losses(run, "difficulty", run.reference, examples)
        score = self.difficulty * even_out(losses)
        if self.quality:
            terms = rate_perplexity(losses), rate_form(run, examples), rate_coherence(run, examples, losses)
            score += self.quality * even_out(torch.stack([even_out(term) for term in terms]).sum(0))
        if self.diversity:
            labels, centres = cluster(embeddings, self.clusters, run.seed)
            score += self.diversity * even_out((embeddings.double() - centres[labels]).norm(dim=1))
        return score / (self.quality + self.diversity + self.difficulty)


def maximise(points: Tensor, scores: Sequence[float], coverage: float) -> list[int]:
    """All places in the order of the greedy algorithm; points [N, d] of length 1, scores [N] not negative.

    Lazily (Minoux, 1978): a gain only falls while the set grows, so one that is not up to date bounds the true one, and
    the first in line is taken once it is up to date. The order is that of the plain algorithm.
    """
    gain = ops.load("facility_gain")
    low = min(float((rows @ points.T).min()) for rows in points.split(ROWS))  # inner product that counts as none
    low = min(low, 1 - 1e-6)  # all alike
    covered = points.new_zeros(len(points))
    total = sum(scores) or 1.0
    reward = (1 - coverage) / total * torch.tensor(scores, dtype=torch.float64)

    def add(places: Tensor) -> Tensor:
        """What these would add to F."""
        found: Tensor = gain(points[places.to(points.device)], points, covered, low)
        return coverage * found.double().cpu() + reward[places]

    bounds = torch.cat([add(places) for places in torch.arange(len(points)).split(ROWS)])
    order: list[int] = []
    for _ in range(len(points)):
        fresh, size = set[int](), 4
        while (best := int(bounds.argmax())) not in fresh:
            places = bounds.topk(min(size, len(points) - len(order))).indices
            bounds[places] = add(places)
            fresh.update(places.tolist())
            size *= 2
        order.append(best)
        similarity = (points @ points[best] - low) / (1 - low)
        covered = torch.maximum(covered, similarity)
        bounds[best] = float("-inf")
    return order
