"""y = x W^T where of every m consecutive inputs of a row of W n are stored (2:4 and the like)."""

from typing import NamedTuple

import torch
from torch import Tensor

from effbench.kernels._common.nm import columns, scatter


class NmMatrix(NamedTuple):
    """W [out, in] as its stored values and their places."""

    values: Tensor  # floats [out, in / m * n]
    places: Tensor  # int32 [out, words], the place of each value among its m inputs, packed
    n: int = 2
    m: int = 4

    def out_features(self, in_features: int) -> int:
        return self.values.shape[0]

    def dense(self, in_features: int) -> Tensor:
        """The matrix, float32 [out, in]."""
        column = columns(self.places, in_features, self.n, self.m)
        return scatter(self.values.to(torch.float32), column, in_features)
