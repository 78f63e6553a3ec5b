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


def input_groups(g_idx: Tensor | None, group_size: int | None, in_features: int, device: torch.device) -> Tensor:
    """The group of every input, int64 [in]: as stored, or consecutive inputs; `group_size` None is one group."""
    if g_idx is not None:
        return g_idx.long()
    return torch.arange(in_features, device=device) // (group_size or in_features)


class IntMatrix(NamedTuple):
    """W [out, in] as integer codes and a grid for each group of inputs."""

    weight: Tensor  # int32 [out, ceil(in * bits / 32)], codes packed along the input
    scale: Tensor  # float16 [out or 1, groups]; without `g_idx`, a group is `group_size` consecutive inputs
    zero: Tensor | None = None  # int32 [ceil(rows of scale * bits / 32), groups], packed along the output; 2^(bits-1)
    g_idx: Tensor | None = None  # int16 or int32 [in], the group of every input (GPTQ's act-order, dynamic groups)
    bits: int = 4
    group_size: int | None = None  # inputs of a group, of which the last may have fewer; None: all are one group

    def out_features(self, in_features: int) -> int:
        return self.weight.shape[0]

    def dense(self, in_features: int) -> Tensor:
        """The decoded matrix, float32 [out, in]."""
        codes = unpack(self.weight, self.bits, in_features)
        zeros = zero_points(self.scale, self.zero, self.bits)
        if self.g_idx is not None:
            group = self.g_idx.long()
            return self.scale.float()[:, group] * (codes - zeros[:, group])
        size = self.group_size or in_features
        lacking = -in_features % size  # of the last group
        filled = torch.nn.functional.pad(codes, (0, lacking)) if lacking else codes
        grouped = filled.view(len(codes), -1, size) - zeros.unsqueeze(-1)
        return (grouped * self.scale.float().unsqueeze(-1)).flatten(1)[:, :in_features]
