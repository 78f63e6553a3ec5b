"""y = x W^T with W in compressed sparse rows of dense blocks."""

from typing import NamedTuple

import torch
from torch import Tensor

from effbench.kernels._common.csr import positions


class BcsrMatrix(NamedTuple):
    """W [out, in] as its n blocks [R, C] that are not zero; `in` is a multiple of C, `out` one of R."""

    crow: Tensor  # int32 [out / R + 1]; block row r has the blocks crow[r] ... crow[r + 1]
    col: Tensor  # int16 or int32 [n], the block column of every block, none twice in a block row
    values: Tensor  # float16, bfloat16 or float32 [n, R, C]

    def out_features(self, in_features: int) -> int:
        return (self.crow.shape[0] - 1) * self.values.shape[1]

    def dense(self, in_features: int) -> Tensor:
        """The matrix with its zeros, at least float32 [out, in]."""
        _, rows, columns = self.values.shape
        wide = torch.promote_types(self.values.dtype, torch.float32)
        shape = (len(self.crow) - 1, in_features // columns, rows, columns)
        blocks = torch.zeros(shape, dtype=wide, device=self.values.device)
        blocks[positions(self.crow, self.col)] = self.values.to(wide)
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)
