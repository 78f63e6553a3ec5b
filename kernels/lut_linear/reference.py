"""y = x W^T with W = lut[code] * absmax[block] + outliers.

NF4 has one table and blocks, SqueezeLLM a table per row and outliers.
"""

from torch import Tensor

from effbench.kernels._common.csr import positions
from effbench.kernels._common.dense import multiply
from effbench.kernels._common.packing import unpack


def dense(
    in_features: int,
    weight: Tensor,
    lut: Tensor,
    absmax: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    bits: int,
    block: int,
) -> Tensor:
    """The decoded matrix, float32 [out, in]."""
    rows = weight.shape[0]
    codes = unpack(weight, bits, in_features).long()
    levels = lut.float().expand(rows, -1) if lut.dim() == 1 else lut.float()
    decoded = levels.gather(1, codes)
    if absmax is not None:
        scale = absmax.repeat_interleave(block)[: decoded.numel()]  # the last block may be short
        decoded *= scale.view_as(decoded)
    if crow is not None and col is not None and values is not None:
        decoded.index_put_(positions(crow, col), values.float(), accumulate=True)
    return decoded


def lut_linear(
    x: Tensor,
    weight: Tensor,
    lut: Tensor,
    absmax: Tensor | None = None,
    crow: Tensor | None = None,
    col: Tensor | None = None,
    values: Tensor | None = None,
    bits: int = 4,
    block: int = 0,
) -> Tensor:
    """x [..., in] -> [..., out].

    weight             int32 [out, ceil(in * bits / 32)], codes of 2, 3 or 4 bits packed along the input
    lut                float16 or float32 [2^bits], or [out, 2^bits]
    absmax             float32 [ceil(out * in / block)], a factor per `block` weights of the flat matrix
    crow, col, values  int32 [out + 1], int16 or int32 [n], float16 [n]: a CSR matrix that is added
    """
    return multiply(x, dense(x.shape[-1], weight, lut, absmax, crow, col, values, bits, block))
