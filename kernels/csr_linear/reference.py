"""y = x W^T with W in compressed sparse rows: the kept weights of every row, one after the other."""

from typing import NamedTuple

import torch
from torch import Tensor

from effbench.kernels._common.csr import positions


class CsrMatrix(NamedTuple):
    """W [out, in] as its n entries that are not zero."""

    crow: Tensor  # int32 [out + 1]; row r has the entries crow[r] ... crow[r + 1]
    col: Tensor  # int16 or int32 [n], the input of every entry, no input twice in a row
    values: Tensor  # float16, bfloat16 or float32 [n]

    def out_features(self, in_features: int) -> int:
        return self.crow.shape[0] - 1

    def dense(self, in_features: int) -> Tensor:
        """The matrix with its zeros, at least float32 [out, in]."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        matrix = torch.zeros(len(self.crow) - 1, in_features, dtype=wide, device=self.values.device)
        matrix[positions(self.crow, self.col)] = self.values.to(wide)
        return matrix
