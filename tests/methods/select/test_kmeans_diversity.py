"""k-means diversity: every beginning of the ranking has clusters in proportion."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from toys_select import blobs, draw_rows, kept, pooled, ranked

from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.methods.select import kmeans_diversity as file
from effbench.methods.select._diverse import score_places, spread
from effbench.methods.select.kmeans_diversity import KMeansDiversity

SIZES = [40, 20, 10, 5]


def test_beginnings_are_webster_apportionments() -> None:
    labels = torch.arange(4).repeat_interleave(torch.tensor(SIZES))
    order = torch.randperm(75, generator=torch.Generator().manual_seed(0))
    places = spread(labels, order)
    assert sorted(places.tolist()) == list(range(75))
    counts = [0] * 4
    for number, place in enumerate(places.tolist(), 1):
        counts[int(labels[place])] += 1
        shares = [number * size / 75 for size in SIZES]
        assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True)), (number, counts)
    # Of one cluster in the order that was given.
    first = [place for place in places.tolist() if place < 40]
    assert first == [place for place in order.tolist() if place < 40]


def test_each_cluster_keeps_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    points = blobs(SIZES)
    monkeypatch.setattr(file, "embed", lambda run, examples, by: points[[int(e.id) for e in examples]])
    found = []
    for seed in range(3):
        run = pooled(draw_rows(75), seed)
        run.apply(KMeansDiversity(keep=0.2, clusters=4))
        places = kept(run)
        clusters = Counter(int(points[place].argmax()) for place in places)
        assert [clusters[label] for label in range(4)] == [8, 4, 2, 1] and len(run.data.reserve) == 60
        found.append(places)
    assert found[0] != found[1] != found[2]  # which of a cluster is chance


def test_typed_outcomes() -> None:
    run = pooled(draw_rows(10))
    with pytest.raises(Unsupported, match="10 examples for 16 clusters"):
        run.apply(parse_step("kmeans_diversity()"))
    run = pooled([*draw_rows(4) * 5])
    with pytest.raises(Unsupported, match="12 of 16 clusters are empty"):
        run.apply(parse_step("kmeans_diversity()"))
    with pytest.raises(Usage, match="clusters must be"):
        KMeansDiversity(clusters=0)


def test_scores_rank_as_the_places_do() -> None:
    assert ranked(score_places([3, 0, 2, 1])) == [3, 0, 2, 1]
