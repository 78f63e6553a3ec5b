"""bitsandbytes' product of a vector with 4-bit weights of one table and a factor per block."""

from collections.abc import Callable

import torch
from torch import Tensor

from effbench.kernels._common.packing import unpack
from effbench.kernels.lut_linear.reference import LutMatrix
from effbench.ops import Declined


def bitsandbytes(x: Tensor, matrix: LutMatrix) -> Callable[[], Tensor]:
    """The one product of theirs that takes any table; that for matrices knows NF4 and FP4 alone."""
    weight, lut, absmax, bits, block = matrix.weight, matrix.lut, matrix.absmax, matrix.bits, matrix.block
    if bits != 4 or lut.dim() != 1 or absmax is None or matrix.crow is not None:
        raise Declined("takes 4 bits, one table, blocks and no outliers")
    if x.numel() != x.shape[-1] or x.shape[-1] % block:
        raise Declined("takes one vector whose size is a multiple of the block's")
    if not x.is_cuda:
        raise Declined("needs a GPU: elsewhere it knows NF4's table alone")
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise Declined(f"cannot be imported: {error}") from None
    codes = unpack(weight, bits, x.shape[-1])
    packed = (codes[:, ::2] << 4 | codes[:, 1::2]).to(dtype=torch.uint8).view(-1, 1)  # the earlier code is higher
    state = functional.QuantState(
        absmax=absmax, shape=(weight.shape[0], x.shape[-1]), code=lut.float(), blocksize=block, dtype=x.dtype
    )
    return lambda: functional.gemv_4bit(x, packed.t(), state=state)
