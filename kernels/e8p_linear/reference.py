"""y = x W^T with W = scale * (E8P point + residual point / residual_scale), 2, 3 or 4 bits a weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from effbench.kernels.e8p_linear.codebook import decode_one_bit, points


class E8PMatrix(NamedTuple):
    """W [out, in] as codes of points of the E8P12 codebook, one per 8 consecutive inputs."""

    weight: Tensor  # int16 [out, in / 8]
    scale: Tensor  # float32, one number
    residual: Tensor | None = None  # int16 [out, in / 8] (E8P12 again: 4 bits) or uint8 [out, in / 8] (E8: 3 bits)
    residual_scale: float = 1.0

    def out_features(self, in_features: int) -> int:
        return self.weight.shape[0]

    def dense(self, in_features: int) -> Tensor:
        """The decoded matrix, float32 [out, in]."""
        decoded = look_up(self.weight)
        if self.residual is not None:
            decode = decode_one_bit if self.residual.dtype == torch.uint8 else look_up
            decoded += decode(self.residual) / self.residual_scale
        return self.scale * decoded.flatten(1)


def look_up(codes: Tensor) -> Tensor:
    """Points of 16-bit codes, float32 [..., 8]."""
    table = points(codes.device)
    return table.index_select(0, codes.flatten().int() & 0xFFFF).view(*codes.shape, 8)
