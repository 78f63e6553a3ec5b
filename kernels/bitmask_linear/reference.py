"""y = x W^T with W as a bitmask: one bit for every place of a row, and the kept weights one after the other."""

from typing import NamedTuple

import torch
from torch import Tensor

from effbench.kernels._common.packing import unpack


class BitmaskMatrix(NamedTuple):
    """W [out, in] as its n entries that are not zero."""

    crow: Tensor  # int32 [out + 1]; row r has the entries crow[r] ... crow[r + 1]
    bits: Tensor  # int32 [out, words], a bit for every input, 1 where an entry is kept, packed
    values: Tensor  # float16, bfloat16 or float32 [n], those of a row in the order of its inputs

    def out_features(self, in_features: int) -> int:
        return self.bits.shape[0]

    def dense(self, in_features: int) -> Tensor:
        """The matrix with its zeros, at least float32 [out, in]."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        keep = unpack(self.bits, 1, in_features).bool()
        return torch.zeros(keep.shape, dtype=wide, device=keep.device).masked_scatter_(keep, self.values.to(wide))
