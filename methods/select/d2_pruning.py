"""D2 pruning: difficulty is passed along a graph of neighbours, and taken back around what is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._diverse import score_places
from effbench.nn.embedders import list_files
from effbench.nn.train.embeddings import embed
from effbench.nn.train.passes import score_losses

ROWS = 1024  # of distances at a time


@dataclass(frozen=True)
class D2Pruning(Select):
    """Section 3 of the paper: an undirected graph of nearest neighbours, forward message passing of difficulty, then
    the best example again and again, with reverse message passing around it.
    """

    paper = "arXiv:2310.07931"
    caveats = (
        "the paper's settings are those of images and classifiers: k = 5 and gamma = 0.1 are those of CIFAR-10",
        "difficulty is the loss under the unchanged model; the paper's is taken from training dynamics",
        "edges are exp(-gamma d) of Euclidean distances between embeddings, as in the authors' code",
    )
    type = "data selection"
    usual = 0.2
    tuned = {"gamma": (0.0, 0.1, 0.5, 1.0), "neighbors": (1, 5, 10, 15), "cutoff": (0.0, 0.1, 0.3)}
    trials = ({}, {"cutoff": 0.3})

    neighbors: int = 5  # k: nearest ones of each example; two are neighbours if either is among the other's
    gamma: float = 0.1  # gamma_r: the smaller, the further what is chosen makes its neighbours less worth
    cutoff: float = 0.0  # share of the hardest examples that is ranked behind all others, as likely noise, in [0, 1)
    by: str = "model"  # what embeds: the model itself, all-minilm-l6-v2, or a folder of sentence-transformers

    def check(self) -> None:
        super().check()
        self.require(self.neighbors >= 1, "neighbors must be at least 1")
        self.require(self.gamma >= 0, "gamma must be at least 0")
        self.require(0 <= self.cutoff < 1, "cutoff must be in [0, 1)")

    def files(self) -> tuple[Path, ...]:
        return list_files(self.by)

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        difficulty = score_losses(run, "difficulty", run.reference, examples).double()
        embeddings = embed(run, examples, self.by)
        easiest_first = difficulty.argsort(stable=True)
        number = len(examples) - int(self.cutoff * len(examples))
        kept = easiest_first[:number].sort().values
        places = pick(embeddings[kept].double(), difficulty[kept], self.neighbors, self.gamma)
        return score_places(torch.cat([kept[places], easiest_first[number:]]))


def pick(embeddings: Tensor, difficulty: Tensor, neighbors: int, gamma: float) -> list[int]:
    """All places in the order in which they are picked; embeddings [N, d], difficulty [N] not negative."""
    starts, ends, distances = connect(embeddings, neighbors)
    # Forward message passing: x_i = s_i + sum of exp(-d_ij) s_j over its neighbours.
    values = difficulty.clone().index_add_(0, starts, (-distances).exp() * difficulty[ends])
    # Reverse message passing: x_j -= exp(-gamma d_kj) x_k around the k that is picked.
    messages = (-gamma * distances).exp()
    bounds = torch.searchsorted(starts, torch.arange(len(values) + 1)).tolist()
    waiting = torch.zeros_like(values)  # minus infinity for those that are picked
    places: list[int] = []
    for _ in range(len(values)):
        place = int((values + waiting).argmax())
        around = slice(bounds[place], bounds[place + 1])
        values[ends[around]] -= messages[around] * values[place]
        waiting[place] = float("-inf")
        places.append(place)
    return places


def connect(embeddings: Tensor, neighbors: int) -> tuple[Tensor, Tensor, Tensor]:
    """Edges of the graph, both ways and sorted: where each starts and ends, and the distance."""
    number = len(embeddings)
    near = []
    for start in range(0, number, ROWS):
        rows = embeddings[start : start + ROWS]
        distances = torch.cdist(rows, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = float("inf")
        near.append(distances.topk(min(neighbors, number - 1), largest=False).indices)
    ends = torch.cat(near)
    starts = torch.arange(number)[:, None].expand_as(ends)
    starts, ends = torch.stack([starts, ends]).flatten(1)
    pairs = torch.cat([starts * number + ends, ends * number + starts]).unique()
    starts, ends = pairs // number, pairs % number
    return starts, ends, (embeddings[starts] - embeddings[ends]).norm(dim=1)
