"""Compressed sparse rows of dense blocks: blocks of zeros are not stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effbench.formats.csr import Compressed
from effbench.kernels.bcsr_linear.cases import OP


def split_blocks(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Matrix [out, in] as blocks [out / rows, in / columns, rows, columns]; ValueError where they do not tile it."""
    out_features, in_features = matrix.shape
    if out_features % rows or in_features % columns:
        raise ValueError(f"blocks of {rows} x {columns} do not tile a matrix of {out_features} x {in_features}")
    return matrix.reshape(out_features // rows, rows, in_features // columns, columns).transpose(1, 2)


def find_whole_blocks(keep: Tensor, rows: int, columns: int) -> Tensor | None:
    """Which blocks `keep` (bool [out, in]) takes, bool [out / rows, in / columns]; None where it cuts one."""
    parts = split_blocks(keep, rows, columns)
    whole = parts.all((2, 3))
    return whole if torch.equal(whole, parts.any((2, 3))) else None


class BCSRLinear(Compressed):
    """The kept blocks of `rows` x `columns` weights of every block row, `number` in all, each with its block column."""

    op = OP

    def __init__(
        self, in_features: int, out_features: int, rows: int, columns: int, number: int, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._reserve(out_features // rows, in_features // columns, number, rows, columns)

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor, block: tuple[int, int], bias: Tensor | None = None) -> BCSRLinear:
        """Hold `weight` [out, in] where `keep` (bool [out, in]) is True; values are stored in its dtype.

        block  rows and columns of a block; ValueError where they do not tile the matrix or `keep` cuts a block
        """
        whole = find_whole_blocks(keep, *block)
        if whole is None:
            raise ValueError(f"some blocks of {block[0]} x {block[1]} are kept only in part")
        values = split_blocks(weight, *block)[whole]
        module = cls(weight.shape[1], weight.shape[0], *block, len(values), bias is not None)
        return module._store(bias, whole, values)

    def config(self) -> dict[str, Any]:
        number, rows, columns = self.values.shape
        return super().config() | {"rows": rows, "columns": columns, "number": number}

    def rebuilt(self, weight: Tensor) -> BCSRLinear:
        """The same positions."""
        _, rows, columns = self.values.shape
        return BCSRLinear.of(weight.to(self.values.dtype), self.kept(), (rows, columns), self.bias)
