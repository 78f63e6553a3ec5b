"""Compressed sparse rows: zeros that lie anywhere are not stored."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from effbench.formats.packed import Packed
from effbench.kernels.csr_linear.cases import OP
from effbench.ops import LinearOp


class Compressed(Packed):
    """What the forms share that store only the kept entries (weights, or blocks of them) of every row of entries.

    Values stay in the dtype of the model. A kept entry is stored even when it is zero, so that the stored
    positions are exactly the kept ones.
    """

    op: ClassVar[LinearOp]
    maskable = False  # the indices say what is kept
    metadata = frozenset({"crow", "col"})
    crow: Tensor
    col: Tensor
    values: nn.Parameter

    def _reserve(self, rows: int, columns: int, *values: int) -> None:
        """Declare the storage of a matrix of rows x columns entries; values: its shape, [n, ...]."""
        self.values = nn.Parameter(torch.zeros(values), requires_grad=False)
        self.reserve("crow", rows + 1, dtype=torch.int32)
        self.reserve("col", values[0], dtype=torch.int16 if columns <= 2**15 else torch.int32)

    def _store(self, bias: Tensor | None, keep: Tensor, values: Tensor) -> Self:
        """Take over values [n, ...] of the entries where keep (bool [rows, columns]) is True, row by row."""
        self.values = nn.Parameter(values.detach().contiguous(), requires_grad=False)
        crow = nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
        return self.fill(bias, crow=crow, col=keep.nonzero()[:, 1])

    def product(self, x: Tensor) -> Tensor:
        return self.op(x, self.crow, self.col, self.values)

    def dense_weight(self) -> Tensor:
        return self.op.matrix(self.crow, self.col, self.values).dense(self.in_features).float()

    def kept(self) -> Tensor:
        return self.op.matrix(self.crow, self.col, torch.ones_like(self.values)).dense(self.in_features).bool()


class CSRLinear(Compressed):
    """The kept weights of every row, `number` in all, each with its column."""

    op = OP

    def __init__(self, in_features: int, out_features: int, number: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self._reserve(out_features, in_features, number)

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor, bias: Tensor | None = None) -> CSRLinear:
        """Hold `weight` [out, in] where `keep` (bool [out, in]) is True; values are stored in its dtype."""
        values = weight[keep]
        module = cls(weight.shape[1], weight.shape[0], len(values), bias is not None)
        return module._store(bias, keep, values)

    def config(self) -> dict[str, Any]:
        return super().config() | {"number": len(self.values)}

    def rebuilt(self, weight: Tensor) -> CSRLinear:
        """The same positions."""
        return CSRLinear.of(weight.to(self.values.dtype), self.kept(), self.bias)
