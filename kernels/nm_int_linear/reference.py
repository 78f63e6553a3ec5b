"""y = x W^T with an n:m sparse W of integer codes: what is kept of every m inputs is `scale * (code - zero)`."""

from torch import Tensor

from effbench.kernels._common.dense import multiply
from effbench.kernels._common.nm import columns, scattered
from effbench.kernels._common.packing import unpack
from effbench.kernels.int_linear.reference import zero_points


def dense(
    in_features: int,
    weight: Tensor,
    index: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    n: int,
    m: int,
) -> Tensor:
    """The decoded matrix, float32 [out, in]."""
    column = columns(index, in_features, n, m)
    zeros = zero_points(scale, zero, bits)
    group = column // (in_features // scale.shape[1]) if g_idx is None else g_idx.long()[column]
    step, origin = (table.expand(len(column), -1).gather(1, group) for table in (scale.float(), zeros))
    return scattered(step * (unpack(weight, bits, column.shape[1]) - origin), column, in_features)


def nm_int_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    g_idx: Tensor | None = None,
    bits: int = 4,
    n: int = 2,
    m: int = 4,
) -> Tensor:
    """x [..., in] -> [..., out].

    weight  int32 [out, words], the codes of the in / m * n stored weights of a row, packed
    index   int32 [out, words], the place of each among its m inputs, packed
    scale, zero, g_idx   as in `int_linear`, by input (not by stored weight)
    """
    return multiply(x, dense(x.shape[-1], weight, index, scale, zero, g_idx, bits, n, m))
