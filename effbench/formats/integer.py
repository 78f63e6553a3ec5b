"""Integers of 2, 3, 4 or 8 bits with scales and zero-points per group, per row or per tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effbench.formats.packed import Packed
from effbench.formats.packing import pack, word_count
from effbench.kernels.int_linear.cases import OP
from effbench.kernels.int_linear.reference import IntMatrix, input_groups, zero_points


class Codes(Packed):
    """Integer codes of some of a row's weights, with scales and zero-points by input."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    g_idx: Tensor | None

    def reserve_codes(
        self, stored: int, bits: int, group_size: int | None, per_tensor: bool, zeros: bool, order: bool
    ) -> None:
        """Declare `stored` codes a row and their grid; ValueError for a grid that cannot be."""
        if bits not in (2, 3, 4, 8):
            raise ValueError(f"bits={bits}: one of 2, 3, 4, 8")
        size = self.in_features if group_size is None else group_size
        if min(size, self.in_features) < 1:
            raise ValueError(f"group_size={group_size}, {self.in_features} inputs: there must be one at least")
        groups = -(-self.in_features // size)
        if per_tensor and groups > 1:
            raise ValueError("a scale per tensor knows no groups")
        self.bits, self.group_size, self.per_tensor = bits, group_size, per_tensor
        rows = 1 if per_tensor else self.out_features
        self.reserve("weight", self.out_features, word_count(stored, bits), dtype=torch.int32)
        self.reserve("scale", rows, groups, dtype=torch.float16)
        self.declare_optional("zero", "g_idx")
        if zeros:
            self.reserve("zero", word_count(rows, bits), groups, dtype=torch.int32)
        if order:
            self.reserve("g_idx", self.in_features, dtype=torch.int32)

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "bits": self.bits,
            "group_size": self.group_size,
            "per_tensor": self.per_tensor,
            "zeros": self.zero is not None,
            "order": self.g_idx is not None,
        }

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero-point (integer) of every weight, [out or 1, in] each."""
        zero = zero_points(self.scale, self.zero, self.bits)
        group = input_groups(self.g_idx, self.group_size, self.in_features, zero.device)
        return self.scale.float()[:, group], zero[:, group]

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes on this grid of `weight` [out, in], int32."""
        scale, zero = self.grid()
        levels = torch.where(scale == 0, 0, weight / scale).round()
        return (levels + zero).clamp(0, 2**self.bits - 1).to(torch.int32)


def describe_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, g_idx: Tensor | None, bits: int, group_size: int | None
) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """Sizes and form of the `Codes` that hold `codes` [out, in], and their grid as stored; see `IntLinear.of`."""
    for name, values in (("codes", codes), ("zero", zero)):
        if values is not None and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
            raise ValueError(f"{name} do not fit in {bits} bits")
    out_features, in_features = codes.shape
    config = {
        "in_features": in_features,
        "out_features": out_features,
        "bits": bits,
        "group_size": group_size,
        "per_tensor": len(scale) == 1 < out_features,
        "zeros": zero is not None,
        "order": g_idx is not None,
    }
    return config, {"scale": scale, "zero": None if zero is None else pack(zero.T, bits).T, "g_idx": g_idx}


class IntLinear(Codes):
    """W = scale * (code - zero), codes packed as compressed-tensors packs them (`pack-quantized`).

    group_size  consecutive inputs that share a scale, the last group may have fewer; None: one scale for a row
    per_tensor  one scale (and no `group_size`) for all rows
    zeros       integer zero-points are stored; otherwise the zero-point is 2^(bits - 1)
    order       the group of every input is stored (GPTQ's act-order with dynamic groups)
    """

    metadata = frozenset({"scale", "zero", "g_idx", "mask"})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None = None,
        per_tensor: bool = False,
        zeros: bool = False,
        order: bool = False,
        masked: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, masked)
        self.reserve_codes(in_features, bits, group_size, per_tensor, zeros, order)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        g_idx: Tensor | None = None,
        *,
        bits: int,
        group_size: int | None = None,
        bias: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> IntLinear:
        """Pack codes [out, in] in [0, 2^bits).

        scale  [out or 1, groups]
        zero   integers in [0, 2^bits), shaped like scale; None: 2^(bits - 1)
        g_idx  integers [in], the group of every input; None: `group_size` consecutive inputs
        keep   bool [out, in], which weights a pruning method left; the others must hold their zero-point
        """
        config, grid = describe_codes(codes, scale, zero, g_idx, bits, group_size)
        module = cls(**config, bias=bias is not None)
        return module.fill(bias, weight=pack(codes, bits), **grid).hold(keep)

    def product(self, x: Tensor) -> Tensor:
        return OP(x, *self._matrix())

    def dense_weight(self) -> Tensor:
        return self._matrix().dense(self.in_features)

    def _matrix(self) -> IntMatrix:
        return IntMatrix(self.weight, self.scale, self.zero, self.g_idx, self.bits, self.group_size)

    def rebuilt(self, weight: Tensor) -> IntLinear:
        """The same scales, zero-points and zeros; every weight goes to the nearest code."""
        module = IntLinear(**self.config()).to(self.device)
        return module.fill(
            self.bias, **self.like() | {"weight": pack(self.nearest(self.mask_weight(weight)), self.bits)}
        )
