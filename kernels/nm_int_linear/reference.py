"""y = x W^T with an n:m sparse W of integer codes: what is kept of every m inputs is `scale * (code - zero)`."""

from typing import NamedTuple

from torch import Tensor

from effbench.kernels._common.nm import columns, scatter
from effbench.kernels._common.packing import unpack
from effbench.kernels.int_linear.reference import input_groups, zero_points


class NmIntMatrix(NamedTuple):
    """W [out, in] as the codes of its stored weights, their places, and a grid for each group of inputs."""

    weight: Tensor  # int32 [out, words], the codes of the in / m * n stored weights of a row, packed
    places: Tensor  # int32 [out, words], the place of each among its m inputs, packed
    scale: Tensor  # with `zero`, `g_idx` and `group_size` as in `IntMatrix`: by input, not by stored weight
    zero: Tensor | None = None
    g_idx: Tensor | None = None
    bits: int = 4
    n: int = 2
    m: int = 4
    group_size: int | None = None

    def out_features(self, in_features: int) -> int:
        return self.weight.shape[0]

    def dense(self, in_features: int) -> Tensor:
        """The decoded matrix, float32 [out, in]."""
        column = columns(self.places, in_features, self.n, self.m)
        zeros = zero_points(self.scale, self.zero, self.bits)
        group = input_groups(self.g_idx, self.group_size, in_features, column.device)[column]
        step, origin = (table.expand(len(column), -1).gather(1, group) for table in (self.scale.float(), zeros))
        return scatter(step * (unpack(self.weight, self.bits, column.shape[1]) - origin), column, in_features)
