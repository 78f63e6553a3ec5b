"""y = x W^T with W = lut[code] * absmax[block] + outliers.

NF4 has one table and blocks, SqueezeLLM a table per row and outliers.
"""

from typing import NamedTuple

from torch import Tensor

from effbench.kernels._common.csr import positions
from effbench.kernels._common.packing import unpack


class LutMatrix(NamedTuple):
    """W [out, in] as codes into a table, with a factor per block and outliers that are added."""

    weight: Tensor  # int32 [out, ceil(in * bits / 32)], codes of 2, 3 or 4 bits packed along the input
    lut: Tensor  # float16 or float32 [2^bits], or a table for every row [out, 2^bits]
    absmax: Tensor | None = None  # float32 [ceil(out * in / block)], a factor per `block` weights of the flat matrix
    crow: Tensor | None = None  # with `col` and `values` a matrix in compressed sparse rows; int32 [out + 1]
    col: Tensor | None = None  # int16 or int32 [n]
    values: Tensor | None = None  # float16 [n]
    bits: int = 4
    block: int = 0  # 0: no factors

    def out_features(self, in_features: int) -> int:
        return self.weight.shape[0]

    def dense(self, in_features: int) -> Tensor:
        """The decoded matrix, float32 [out, in]."""
        codes = unpack(self.weight, self.bits, in_features).long()
        levels = self.lut.float().expand(len(codes), -1) if self.lut.dim() == 1 else self.lut.float()
        decoded = levels.gather(1, codes)
        if self.absmax is not None:
            scale = self.absmax.repeat_interleave(self.block)[: decoded.numel()]  # the last block may be short
            decoded *= scale.view_as(decoded)
        if self.crow is not None and self.col is not None and self.values is not None:
            decoded.index_put_(positions(self.crow, self.col), self.values.float(), accumulate=True)
        return decoded
