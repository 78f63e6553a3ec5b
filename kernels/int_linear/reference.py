"""y = x W^T with W = scale * (code - zero), integer codes of 2, 3, 4 or 8 bits."""

from typing import NamedTuple

import torch
from torch import Tensor

from effbench.kernels._common.packing import unpack


def zero_points(scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The zero-points, int32 shaped like `scale`: unpacked, or 2^(bits - 1) where none are stored."""
    if zero is None:
        return torch.full_like(scale, 2 ** (bits - 1), dtype=torch.int32)
    return unpack(zero.T, bits, scale.shape[0]).T


class IntMatrix(NamedTuple):
    """W [out, in] as integer codes and a grid for each group of inputs."""

    weight: Tensor  # int32 [out, ceil(in * bits / 32)], codes packed along the input
    scale: Tensor  # float16 [out or 1, groups]; without `g_idx`, groups are in / groups consecutive inputs
    zero: Tensor | None = None  # int32 [ceil(rows of scale * bits / 32), groups], packed along the output; 2^(bits-1)
    g_idx: Tensor | None = None  # int16 or int32 [in], the group of every input (GPTQ's act-order, dynamic groups)
    bits: int = 4

    def out_features(self, in_features: int) -> int:
        return self.weight.shape[0]

    def dense(self, in_features: int) -> Tensor:
        """The decoded matrix, float32 [out, in]."""
        codes = unpack(self.weight, self.bits, in_features)
        zeros = zero_points(self.scale, self.zero, self.bits)
        if self.g_idx is not None:
            group = self.g_idx.long()
            return self.scale.float()[:, group] * (codes - zeros[:, group])
        grouped = codes.view(len(codes), self.scale.shape[1], -1) - zeros.unsqueeze(-1)
        return (grouped * self.scale.float().unsqueeze(-1)).flatten(1)
