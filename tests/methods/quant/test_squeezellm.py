"""SqueezeLLM and its weighted k-means."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from toys_quant import make_layer, rows

from effbench.methods.quant._kmeans import Sums, kmeans, lloyd
from effbench.methods.quant.rtn import RTN
from effbench.methods.quant.squeezellm import SqueezeLLM
from effbench.nn.model.linear import dense_weight


def inertia(values: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    return ((values.unsqueeze(2) - centres.unsqueeze(1)).square().amin(2) * weights).sum(1)


@pytest.mark.parametrize(("n", "k"), [(64, 4), (128, 8), (300, 16)])
def test_kmeans_equals_scikit_learn(n: int, k: int) -> None:
    values, weights = rows(n)
    share = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    start = values.quantile(share, dim=1).T.contiguous()
    same = lloyd(Sums(values, weights), start)
    ours = inertia(values, weights, kmeans(values, weights, k))
    for row in range(len(values)):
        points, by = values[row, :, None].numpy(), weights[row].numpy()
        theirs = KMeans(k, init=start[row, :, None].numpy(), n_init=1, max_iter=1000, tol=0)
        theirs.fit(points, sample_weight=by)
        centres = torch.from_numpy(theirs.cluster_centers_).flatten().sort().values
        assert torch.allclose(same[row], centres, atol=1e-9)
        authors = KMeans(k, random_state=0, n_init="auto", max_iter=50).fit(points, sample_weight=by)
        assert ours[row] <= authors.inertia_ * (1 + 1e-9)


def test_kmeans_of_short_rows_is_optimal() -> None:
    values, weights = rows(14, count=6)
    found = inertia(values, weights, kmeans(values, weights, 3))
    for row in range(6):
        x, w = values[row], weights[row]
        best = min(
            sum(
                float((w[a:b] * (x[a:b] - (w[a:b] * x[a:b]).sum() / w[a:b].sum()).square()).sum())
                for a, b in ((0, i), (i, j), (j, 14))
            )
            for i in range(1, 13)
            for j in range(i + 1, 14)
        )
        assert found[row].item() == pytest.approx(best, rel=1e-9)


def test_kmeans_of_degenerate_rows() -> None:
    constant = torch.full((2, 40), 0.5)
    constant[1] = 0
    for importance in (torch.zeros(2, 40), torch.ones(2, 40)):
        assert inertia(constant, torch.ones(2, 40), kmeans(constant, importance, 8)).max() == 0
    with_zero = kmeans(*rows(50, count=5), 8, zero=True)
    assert (with_zero == 0).sum(1).tolist() == [1] * 5


def test_squeezellm_keeps_sensitive_and_large_weights() -> None:
    layer = make_layer(out=64, width=256)
    method = SqueezeLLM(bits=3, sensitive=0.005, outliers=0.01)
    module = method.compress(layer)
    dense, numel = dense_weight(module), layer.weight.numel()
    error = (dense - layer.weight).abs()
    sensitive = layer.inputs.grad2.flatten().topk(int(0.005 * numel)).indices
    rest = layer.weight.abs().flatten().index_fill(0, sensitive, 0)
    large = rest.topk(int(0.01 * numel)).indices
    apart = torch.cat([sensitive, large])
    assert error.flatten()[apart].max() < 1e-4  # float16 of what the table leaves over
    assert len(module.values) == len(apart) == int(0.005 * numel) + int(0.01 * numel)
    weighted = [
        float((layer.inputs.grad2 * (dense_weight(m.compress(layer)) - layer.weight).square()).sum())
        for m in (method, SqueezeLLM(bits=3, sensitive=0, outliers=0), RTN(bits=3, granularity="channel"))
    ]
    assert weighted[0] < weighted[1] < weighted[2]
