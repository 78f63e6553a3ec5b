"""y = x W^T with W in compressed sparse rows: the kept weights of every row, one after the other."""

import torch
from torch import Tensor

from effbench.kernels._common.csr import positions
from effbench.kernels._common.dense import multiply


def dense(in_features: int, crow: Tensor, col: Tensor, values: Tensor) -> Tensor:
    """The matrix with its zeros, at least float32 [out, in]."""
    wide = torch.promote_types(values.dtype, torch.float32)
    matrix = torch.zeros(len(crow) - 1, in_features, dtype=wide, device=values.device)
    matrix[positions(crow, col)] = values.to(wide)
    return matrix


def csr_linear(x: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> Tensor:
    """x [..., in] -> [..., out].

    crow    int32 [out + 1]; row r has the entries crow[r] ... crow[r + 1]
    col     int16 or int32 [n], the input of every entry, no input twice in a row
    values  float16, bfloat16 or float32 [n]
    """
    return multiply(x, dense(x.shape[-1], crow, col, values))
