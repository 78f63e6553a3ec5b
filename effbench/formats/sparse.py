"""Pruned linears: dense with a mask while a recipe is at work, packed by their pattern when it is done."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from effbench.formats.bcsr import BCSRLinear, find_whole_blocks
from effbench.formats.csr import pack_unstructured
from effbench.formats.nm import NMLinear
from effbench.nn.model.linear import MaskedLinear, Storage, make_linear, stored_bytes


class Pattern(NamedTuple):
    """Where zeros may lie: anywhere, n of every m consecutive inputs of a row kept, or whole blocks."""

    kind: str  # "unstructured", "n:m" or "block"
    first: int = 0  # n, or rows of a block
    second: int = 0  # m, or columns of a block

    @classmethod
    def of(cls, text: str) -> Pattern:
        """Parse `unstructured`, `n:m` or `block:RxC`; ValueError otherwise."""
        if text == "unstructured":
            return cls("unstructured")
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            n, m = int(match[1]), int(match[2])
            if not 0 < n < m <= 16:
                raise ValueError(f"pattern={text!r}: n:m keeps n of every m, 0 < n < m <= 16")
            return cls("n:m", n, m)
        if match := re.fullmatch(r"block:(\d+)x(\d+)", text):
            rows, columns = int(match[1]), int(match[2])
            if not rows * columns:
                raise ValueError(f"pattern={text!r}: a block has at least one row and one column")
            return cls("block", rows, columns)
        raise ValueError(
            f"pattern={text!r}: one of 'unstructured', 'n:m' such as '2:4', 'block:RxC' such as 'block:16x16'"
        )

    def check_shape(self, out: int, width: int) -> None:
        """Raise `ValueError` for a matrix [out, in] that the pattern does not divide."""
        if self.kind == "n:m" and width % self.second:
            pattern = f"{self.first}:{self.second}"
            raise ValueError(f"width {width} is not a multiple of {self.second}, as pattern {pattern} needs")
        if self.kind == "block" and (out % self.first or width % self.second):
            raise ValueError(f"{out} x {width} does not divide into blocks of {self.first} x {self.second}")


class PrunedLinear(MaskedLinear):
    """A masked linear that knows the pattern of its zeros and hence how an artifact stores it."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, pattern: str = "unstructured") -> None:
        super().__init__(in_features, out_features, bias)
        self.pattern = pattern

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor, bias: Tensor | None = None, pattern: str = "unstructured") -> Self:
        """Hold `weight` [out, in] where `keep` (bool [out, in]) is True and zero elsewhere."""
        module = super().of(weight, keep, bias)
        module.pattern = pattern
        return module

    def config(self) -> dict[str, object]:
        return super().config() | {"pattern": self.pattern}

    def rebuilt(self, weight: Tensor) -> PrunedLinear:
        return PrunedLinear.of(weight.to(self.weight.dtype), self.kept(), self.bias, self.pattern)

    def pack(self, storage: torch.dtype | Storage) -> nn.Module:
        """The form of the pattern, or a plain linear where its zeros save less than it takes to place them."""
        packed = self._pack()
        dense = make_linear(self.weight.detach(), self.bias)
        return min(dense, packed, key=lambda module: sum(stored_bytes(module, storage)))

    def _pack(self) -> nn.Module:
        kind, first, second = Pattern.of(self.pattern)
        weight, keep = self.weight.detach(), self.kept()
        if kind == "n:m":
            return NMLinear.of(weight, keep, n=first, m=second, bias=self.bias)
        if (
            kind == "block" and find_whole_blocks(keep, first, second) is not None
        ):  # another mask may have cut into them
            return BCSRLinear.of(weight, keep, block=(first, second), bias=self.bias)
        return pack_unstructured(weight, keep, self.bias)
