"""D2 pruning: the authors' order, our own reckoning, and not the seed's band of losses."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from toys_select import blobs, draw_rows, golden, pooled, ranked

from effbench.core.errors import Usage
from effbench.methods.select import d2_pruning as file
from effbench.methods.select.d2_pruning import D2Pruning, pick


@pytest.mark.parametrize(("neighbors", "gamma"), [(5, 0.1), (3, 1.0), (10, 0.0)])
def test_the_order_is_that_of_the_authors(neighbors: int, gamma: float) -> None:
    tensors = golden()
    found = pick(tensors["points"], tensors["difficulty"], neighbors, gamma)
    assert found == tensors[f"d2_{neighbors}_{gamma}"].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_that_of_the_equations(seed: int) -> None:
    chance = numpy.random.default_rng(seed)
    points, scores = chance.normal(size=(50, 6)), chance.gamma(2.0, size=50)
    near = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(points).kneighbors(return_distance=False)
    around = [{j for j in range(50) if j in near[i] or i in near[j]} for i in range(50)]

    def distance(i: int, j: int) -> float:
        return float(numpy.sqrt(((points[i] - points[j]) ** 2).sum()))

    values = [scores[i] + sum(numpy.exp(-distance(i, j)) * scores[j] for j in around[i]) for i in range(50)]
    free, order = set(range(50)), []
    while free:
        best = max(free, key=values.__getitem__)
        for j in around[best]:
            values[j] -= numpy.exp(-0.5 * distance(best, j)) * values[best]
        free.remove(best)
        order.append(best)
    assert pick(torch.from_numpy(points), torch.from_numpy(scores), 4, 0.5) == order


def score(monkeypatch: pytest.MonkeyPatch, points: Any, losses: Any, method: D2Pruning) -> list[int]:
    run = pooled(draw_rows(len(points)))
    monkeypatch.setattr(file, "embed", lambda run, examples, by: points)
    monkeypatch.setattr(file, "score_losses", lambda run, name, model, examples: losses)
    return ranked(method.score(run.data.pool, run))


def test_it_is_no_band_of_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed drops the lowest and highest losses; D2 keeps the hardest, and something of every region."""
    points = blobs([8, 8, 8, 8])
    losses = torch.tensor([4.0, 3.0, 2.0, 1.0]).repeat_interleave(8) + 0.01 * torch.arange(32)
    chosen = score(monkeypatch, points, losses, D2Pruning(gamma=0.1))[:4]
    assert sorted(place // 8 for place in chosen) == [0, 1, 2, 3]
    band = losses.argsort()[8:24].tolist()
    assert chosen[0] // 8 == 0 and not set(chosen) <= set(band)


def test_the_hardest_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    points, losses = blobs([8, 8, 8, 8]), torch.randperm(32, generator=torch.Generator().manual_seed(0)).float()
    found = score(monkeypatch, points, losses, D2Pruning(cutoff=0.25))
    assert sorted(found) == list(range(32))
    assert losses[found[24:]].tolist() == list(range(24, 32))
    easier = torch.nonzero(losses < 24)[:, 0]
    expected = pick(points[easier].double(), losses[easier].double(), 5, 0.1)
    assert found[:24] == easier[expected].tolist()


def test_fewer_examples_than_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(score(monkeypatch, blobs([1, 2]), torch.ones(3), D2Pruning())) == [0, 1, 2]
    assert score(monkeypatch, blobs([1]), torch.ones(1), D2Pruning()) == [0]


@pytest.mark.parametrize("settings", [{"neighbors": 0}, {"gamma": -1.0}, {"cutoff": 1.0}])
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        D2Pruning(**settings)
