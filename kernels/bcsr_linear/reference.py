"""y = x W^T with W in compressed sparse rows of dense blocks."""

import torch
from torch import Tensor

from effbench.kernels._common.csr import positions
from effbench.kernels._common.dense import multiply


def dense(in_features: int, crow: Tensor, col: Tensor, values: Tensor) -> Tensor:
    """The matrix with its zeros, at least float32 [out, in]."""
    _, rows, columns = values.shape
    wide = torch.promote_types(values.dtype, torch.float32)
    shape = (len(crow) - 1, in_features // columns, rows, columns)
    blocks = torch.zeros(shape, dtype=wide, device=values.device)
    blocks[positions(crow, col)] = values.to(wide)
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def bcsr_linear(x: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> Tensor:
    """x [..., in] -> [..., out]; `in` is a multiple of C, `out` one of R.

    crow    int32 [out / R + 1]; block row r has the blocks crow[r] ... crow[r + 1]
    col     int16 or int32 [n], the block column of every block, none twice in a block row
    values  float16, bfloat16 or float32 [n, R, C]
    """
    return multiply(x, dense(x.shape[-1], crow, col, values))
