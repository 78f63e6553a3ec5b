"""n:m sparsity: of every m consecutive inputs of a row only n weights are stored, as floats or as integer codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effbench.formats.integer import Codes, describe_codes
from effbench.formats.packed import Packed
from effbench.formats.packing import pack
from effbench.kernels._common.nm import columns, index_words, place_bits
from effbench.kernels.nm_int_linear.cases import OP as INT_OP
from effbench.kernels.nm_int_linear.reference import NmIntMatrix
from effbench.kernels.nm_linear.cases import OP
from effbench.kernels.nm_linear.reference import NmMatrix

PATTERNS = ((2, 4), (4, 8))  # patterns that hardware and papers know


def pattern_of(keep: Tensor | None) -> tuple[int, int] | None:
    """The pattern (n, m) that a mask [out, in] has exactly, or None."""
    for n, m in PATTERNS:
        if keep is not None and keep.shape[1] % m == 0 and bool((keep.unflatten(1, (-1, m)).sum(-1) == n).all()):
            return n, m
    return None


def places(keep: Tensor, n: int, m: int) -> Tensor:
    """The n kept places of every m inputs, ascending, int64 [out, in / m * n]; spare ones where fewer are kept.

    ValueError where more are kept or the width does not divide."""
    if keep.shape[1] % m:
        raise ValueError(f"{keep.shape[1]} inputs are not a multiple of {m}")
    groups = keep.unflatten(1, (-1, m))
    if int(groups.sum(-1).max()) > n:
        raise ValueError(f"more than {n} of {m} weights are kept")
    kept_first = groups.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :n]
    ascending: Tensor = kept_first.sort(-1).values.flatten(1)
    return ascending


class _NM(Packed):
    """What both forms share: the places of the stored weights."""

    maskable = False  # the places say what is kept
    index: Tensor

    def __init__(self, in_features: int, out_features: int, n: int, m: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        if in_features % m:
            raise ValueError(f"{in_features} inputs are not a multiple of {m}")
        self.n, self.m = n, m
        self.reserve("index", out_features, index_words(in_features, n, m), dtype=torch.int32)

    def config(self) -> dict[str, Any]:
        return super().config() | {"n": self.n, "m": self.m}

    def columns(self) -> Tensor:
        """The input of every stored weight, int64 [out, in / m * n]."""
        return columns(self.index, self.in_features, self.n, self.m)

    def kept(self) -> Tensor:
        keep = torch.zeros(self.out_features, self.in_features, dtype=torch.bool, device=self.index.device)
        return keep.scatter_(1, self.columns(), True)


class NMLinear(_NM):
    """The kept weights as floats, each with its place among its m inputs (2 bits for 2:4)."""

    metadata = frozenset({"index"})

    def __init__(self, in_features: int, out_features: int, n: int = 2, m: int = 4, bias: bool = False) -> None:
        super().__init__(in_features, out_features, n, m, bias)
        values = torch.zeros(out_features, in_features // m * n)
        self.values = nn.Parameter(values, requires_grad=False)

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor, *, n: int, m: int, bias: Tensor | None = None) -> NMLinear:
        """Store `weight` [out, in] where `keep` (bool [out, in], at most n of every m) is True."""
        place = places(keep, n, m)
        module = cls(weight.shape[1], weight.shape[0], n, m, bias is not None).to(weight.device)
        module.fill(bias, index=pack(place, place_bits(m)))
        return module._with(weight * keep)

    def _with(self, weight: Tensor) -> NMLinear:
        self.values = nn.Parameter(weight.gather(1, self.columns()), requires_grad=False)
        return self

    def product(self, x: Tensor) -> Tensor:
        return OP(x, self.values, self.index, self.n, self.m)

    def dense_weight(self) -> Tensor:
        return NmMatrix(self.values, self.index, self.n, self.m).dense(self.in_features)

    def rebuilt(self, weight: Tensor) -> NMLinear:
        module = NMLinear(**self.config()).to(self.index.device).fill(self.bias, **self.like())
        return module._with(weight.to(self.values.dtype))


class NMIntLinear(_NM, Codes):
    """The kept weights as the integer codes of an `IntLinear`: 3 bits a weight and the scales for 4-bit 2:4."""

    metadata = frozenset({"index", "scale", "zero", "g_idx"})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        n: int = 2,
        m: int = 4,
        group_size: int | None = None,
        per_tensor: bool = False,
        zeros: bool = False,
        order: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, n, m, bias)
        self.reserve_codes(in_features // m * n, bits, group_size, per_tensor, zeros, order)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        g_idx: Tensor | None = None,
        *,
        bits: int,
        keep: Tensor,
        pattern: tuple[int, int],
        group_size: int | None = None,
        bias: Tensor | None = None,
    ) -> NMIntLinear:
        """Store the codes [out, in] that `keep` (bool [out, in], at most n of every m) names; see `IntLinear.of`."""
        n, m = pattern
        place = pack(places(keep, n, m), place_bits(m))
        column = columns(place, codes.shape[1], n, m)
        config, grid = describe_codes(codes, scale, zero, g_idx, bits, group_size)
        module = cls(**config, n=n, m=m, bias=bias is not None)
        return module.fill(bias, weight=pack(codes.gather(1, column), bits), index=place, **grid)

    def product(self, x: Tensor) -> Tensor:
        return INT_OP(x, *self._matrix())

    def dense_weight(self) -> Tensor:
        return self._matrix().dense(self.in_features)

    def _matrix(self) -> NmIntMatrix:
        grid = (self.scale, self.zero, self.g_idx)
        return NmIntMatrix(self.weight, self.index, *grid, self.bits, self.n, self.m, self.group_size)

    def rebuilt(self, weight: Tensor) -> NMIntLinear:
        """The same scales, zero-points and places; every stored weight goes to the nearest code."""
        codes = self.nearest(weight.float()).gather(1, self.columns())
        module = NMIntLinear(**self.config()).to(self.device)
        return module.fill(self.bias, **self.like() | {"weight": pack(codes, self.bits)})
