"""Choices of scikit-learn's k-means, DPPy, apricot and the authors of D2 pruning among a few points."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import numpy
import torch
from apricot import FacilityLocationSelection
from dppy.exact_sampling import elementary_symmetric_polynomials
from dppy.finite_dpps import FiniteDPP
from golden import clone, write
from sklearn.cluster import KMeans

D2 = "adymaharana/d2pruning", "bf1ea46b22cc79549df421fcd92c9cd2d3408008"
CLUSTERS, DRAWS, SMALL, CHOSEN = 5, 20_000, 6, 3
GRAPHS = [(5, 0.1), (3, 1.0), (10, 0.0)]  # neighbours and gamma_r


def draw_points(number: int, width: int, seed: int) -> numpy.ndarray:
    """Directions [number, width] round a few centres."""
    chance = numpy.random.default_rng(seed)
    centres = chance.normal(size=(CLUSTERS, width))
    points = centres[chance.integers(CLUSTERS, size=number)] + 0.4 * chance.normal(size=(number, width))
    return (points / numpy.linalg.norm(points, axis=1, keepdims=True)).astype(numpy.float32).astype(numpy.float64)


def choose_by_d2(points: numpy.ndarray, difficulty: torch.Tensor, neighbors: int, gamma: float) -> list[list[int]]:
    """The authors' sets of every size, sorted; they do not say in which order they pick."""
    from sampling import GraphDensitySampler

    settings = SimpleNamespace(
        graph_mode="sum",
        graph_sampling_mode="weighted",
        n_neighbor=neighbors,
        precomputed_dists=None,
        precomputed_neighbors=None,
    )
    sets = []
    for number in range(1, len(points) + 1):
        sampler = GraphDensitySampler(points, None, 0, gamma=gamma, importance_scores=difficulty, args=settings)
        sets.append(sorted(int(place) for place in sampler.select_batch_(number)))
    return sets


def main() -> None:
    points = draw_points(60, 8, 0)
    tensors = {"points": torch.from_numpy(points)}

    kmeans = KMeans(CLUSTERS, n_init=1, random_state=3).fit(points)
    tensors |= {"labels": torch.from_numpy(kmeans.labels_), "centres": torch.from_numpy(kmeans.cluster_centers_)}

    cosines = points @ points.T
    similarity = (cosines - cosines.min()) / (1 - cosines.min())
    selection = FacilityLocationSelection(len(points), metric="precomputed", optimizer="naive").fit(similarity)
    tensors["facility_order"] = torch.from_numpy(selection.ranking.astype(numpy.int64))
    tensors["facility_gains"] = torch.from_numpy(selection.gains.astype(numpy.float64))

    few = draw_points(SMALL, 4, 1)
    squares = ((few[:, None] - few) ** 2).sum(-1)
    kernel = numpy.exp(-squares / (2 * numpy.median(squares[squares > 0])))
    process, chance = FiniteDPP("likelihood", L=kernel), numpy.random.RandomState(0)
    drawn = Counter(
        tuple(sorted(int(place) for place in process.sample_exact_k_dpp(size=CHOSEN, random_state=chance)))
        for _ in range(DRAWS)
    )
    eigenvalues = numpy.linalg.eigvalsh(kernel)
    tensors |= {
        "few": torch.from_numpy(few),
        "kernel": torch.from_numpy(kernel),
        "shares": torch.tensor([drawn[chosen] / DRAWS for chosen in combinations(range(SMALL), CHOSEN)]),
        "polynomials": torch.from_numpy(elementary_symmetric_polynomials(eigenvalues, CHOSEN)),
    }

    folder = clone(*D2, "core/data/sampling.py")
    sys.path.insert(0, str(folder / "core" / "data"))
    difficulty = torch.from_numpy(numpy.random.default_rng(2).gamma(2.0, size=len(points)))
    tensors["difficulty"] = difficulty
    for neighbors, gamma in GRAPHS:
        sets = choose_by_d2(points, difficulty, neighbors, gamma)
        # Sets grow by one: what is new in each is what was picked.
        order = [(set(new) - set(old)).pop() for old, new in zip([[], *sets], sets, strict=False)]
        tensors[f"d2_{neighbors}_{gamma}"] = torch.tensor(order)
    packages = ["scikit-learn", "apricot-select", "dppy", "numpy"]
    write("diversity", __file__, packages, tensors, d2pruning=D2[1], draws=DRAWS)


if __name__ == "__main__":
    main()
