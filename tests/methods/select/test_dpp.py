"""k-DPPs: draws have the probabilities of determinants, and greedy MAP is greedy."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
import torch
from toys_select import blobs, draw_rows, golden, kept, pooled

from effbench.core.errors import Unsupported
from effbench.core.recipe import parse_step
from effbench.methods.select import _kdpp
from effbench.methods.select._kdpp import build_kernel, maximise, rank, sample, sum_products

DRAWS = 2000


def determinants(kernel: torch.Tensor, k: int) -> torch.Tensor:
    """Of all sets of k, in order."""
    return torch.stack([torch.det(kernel[list(chosen)][:, list(chosen)]) for chosen in combinations(range(6), k)])


def test_the_kernel_is_the_gaussian_of_the_median_distance() -> None:
    tensors = golden()
    assert torch.allclose(build_kernel(tensors["few"], "gaussian"), tensors["kernel"], atol=1e-12)
    quality = torch.arange(1.0, 7.0)
    few = tensors["few"]
    for kind in ("gaussian", "cosine"):
        kernel, plain = build_kernel(few, kind, quality), build_kernel(few, kind)
        assert torch.allclose(kernel[1, 4], 2 * plain[1, 4] * 5) and torch.allclose(
            kernel.diag(), quality.double() ** 2
        )
    assert torch.allclose(build_kernel(few, "cosine"), few @ few.T)


def test_symmetric_polynomials_are_those_of_dppy() -> None:
    tensors = golden()
    found = sum_products(torch.linalg.eigvalsh(tensors["kernel"]), 3).exp().T
    assert torch.allclose(found, tensors["polynomials"], rtol=1e-9, atol=0)


def test_draws_have_the_probabilities_of_determinants() -> None:
    tensors = golden()
    kernel, chance = tensors["kernel"], torch.Generator().manual_seed(0)
    expected = determinants(kernel, 3)
    expected /= expected.sum()
    assert (tensors["shares"] - expected).abs().max() < 0.015  # DPPy's own draws, 20,000
    assert expected.max() > 1.5 * expected.min()  # so that uniform draws would be found out
    drawn = Counter(tuple(sorted(sample(kernel, 3, chance))) for _ in range(DRAWS))
    counts = torch.tensor([drawn[chosen] for chosen in combinations(range(6), 3)])
    statistic = float(((counts - DRAWS * expected) ** 2 / (DRAWS * expected)).sum())
    assert statistic < 43.8  # chi-squared, 19 degrees of freedom: 0.001
    uniform = float(((counts - DRAWS / 20) ** 2 / (DRAWS / 20)).sum())
    assert uniform > 43.8


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_greedy_takes_what_adds_most_to_the_determinant(k: int) -> None:
    quality = torch.tensor([1.0, 1.3, 0.7, 1.1, 0.9, 1.2])
    kernel = build_kernel(golden()["few"], "gaussian", quality)
    chosen: list[int] = []
    for _ in range(k):
        free = [place for place in range(6) if place not in chosen]
        chosen.append(max(free, key=lambda place: float(torch.det(kernel[[*chosen, place]][:, [*chosen, place]]))))
    assert maximise(kernel, k) == chosen
    places = rank(kernel, k, "greedy", 0).tolist()
    assert places[:k] == chosen and sorted(places) == list(range(6))
    rest = places[k:]
    volumes = [float(torch.det(kernel[[*chosen, place]][:, [*chosen, place]])) for place in rest]
    assert volumes == sorted(volumes, reverse=True)  # behind them by the variance that is left


@pytest.mark.parametrize("draw", ["sample", "greedy"])
def test_tight_clusters_give_one_each(draw: str) -> None:
    kernel = build_kernel(blobs([5, 5, 5, 5], 1e-3), "gaussian")
    for seed in range(5):
        places = rank(kernel, 4, draw, seed)[:4]
        assert sorted((places // 5).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("draw", ["sample", "greedy"])
def test_too_low_a_rank_is_told(draw: str) -> None:
    points = blobs([2, 2, 2])[[0, 0, 0, 2, 2, 2, 4]]
    with pytest.raises(Unsupported, match=r"of 7 examples only about 3 are different enough.*5 are to be kept"):
        rank(build_kernel(points, "gaussian"), 5, draw, 0)
    wide = torch.nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    with pytest.raises(Unsupported, match="only about 4 are"):
        rank(build_kernel(wide, "cosine"), 5, draw, 0)
    assert rank(build_kernel(points, "gaussian"), 7, draw, 0).tolist() == list(range(7))


def test_too_many_examples_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kdpp, "LARGEST", 5)
    with pytest.raises(Unsupported, match="all pairs of 6 examples"):
        build_kernel(golden()["few"], "gaussian")


def test_a_run_keeps_the_number_that_it_draws() -> None:
    found = []
    for seed in (0, 0, 1):
        run = pooled(draw_rows(40), seed)
        run.apply(parse_step("dpp(keep=0.25)"))
        assert len(run.data.train) == 10 and len(run.data.reserve) == 30
        found.append(kept(run))
    assert found[0] == found[1] != found[2]
    run.apply(parse_step("dpp()"))  # as many as there are: nothing is left to choose
    assert sorted(kept(run)) == sorted(found[2])
