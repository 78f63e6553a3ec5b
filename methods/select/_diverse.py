"""What the selectors that spread over a space share: rankings from clusters, and as scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def spread(labels: Tensor, order: Tensor) -> Tensor:
    """Places in a ranking [N] of which any beginning holds examples of each cluster in proportion to its size.

    The m-th example of a cluster of n, from 0 on, stands at (m + 1/2) / n: Webster's apportionment, for any number that
    is kept. labels [N] are the clusters of examples, order [N] says in which order they are taken from a cluster.
    """
    sizes = torch.bincount(labels).tolist()
    taken = [0] * len(sizes)
    keys = []
    for label in labels[order].tolist():
        keys.append((taken[label] + 0.5) / sizes[label])
        taken[label] += 1
    return order[torch.tensor(keys, dtype=torch.float64).argsort(stable=True)]


def score_places(places: Tensor | Sequence[int]) -> Tensor:
    """Scores [N] that rank examples as these N places do, best first."""
    scores = torch.empty(len(places))
    scores[torch.as_tensor(places)] = -torch.arange(len(places), dtype=scores.dtype)
    return scores
