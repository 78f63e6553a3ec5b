"""Tables of scikit-learn's weighted k-means as SqueezeLLM's authors call it (`kmeans_fit` of their nuq.py)."""

from __future__ import annotations

import torch
from golden import write
from sklearn.cluster import KMeans
from torch import Tensor

ROWS, WIDTH = 8, 256


def fit(weight: Tensor, importance: Tensor, k: int) -> Tensor:
    """Centres [k] of one row."""
    means = KMeans(n_clusters=k, random_state=0, n_init="auto", max_iter=50)
    means.fit(weight[:, None].numpy(), sample_weight=importance.numpy())
    return torch.from_numpy(means.cluster_centers_).flatten()


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, generator=generator) * 0.02
    importance = torch.randn(ROWS, WIDTH, generator=generator).square()
    tensors = {"weight": weight, "importance": importance}
    for bits in (2, 3, 4):
        rows = [fit(*row, 2**bits) for row in zip(weight, importance, strict=True)]
        tensors[f"b{bits}.lut"] = torch.stack(rows).float()
    write("squeezellm", __file__, ["scikit-learn"], tensors, seed=0, source="SqueezeAILab/SqueezeLLM")
