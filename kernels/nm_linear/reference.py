"""y = x W^T where of every m consecutive inputs of a row of W n are stored (2:4 and the like)."""

import torch
from torch import Tensor

from effbench.kernels._common.dense import multiply
from effbench.kernels._common.nm import columns, scattered


def dense(in_features: int, values: Tensor, index: Tensor, n: int, m: int) -> Tensor:
    """The matrix, float32 [out, in]."""
    return scattered(values.to(torch.float32), columns(index, in_features, n, m), in_features)


def nm_linear(x: Tensor, values: Tensor, index: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """x [..., in] -> [..., out].

    values  floats [out, in / m * n]
    index   int32 [out, words], the place of each value among its m inputs, packed
    """
    return multiply(x, dense(x.shape[-1], values, index, n, m))
