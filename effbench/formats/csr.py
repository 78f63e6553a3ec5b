"""Compressed rows: zeros that lie anywhere are not stored, and a column for every weight or a bit for every place says
where the others are.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from effbench.formats.packed import Packed
from effbench.formats.packing import pack, word_count
from effbench.kernels.bitmask_linear.cases import OP as BITMASK_OP
from effbench.kernels.csr_linear.cases import OP
from effbench.nn.model.linear import stored_bytes
from effbench.ops import LinearOp


class Compressed(Packed):
    """What the forms share that store only the kept entries (weights, or blocks of them) of every row of entries.

    Values stay in the dtype of the model. A kept entry is stored even when it is zero, so that the stored
    positions are exactly the kept ones.
    """

    op: ClassVar[LinearOp]
    places: ClassVar[str] = "col"  # the tensor that says where in its row an entry lies
    maskable = False  # the places say what is kept
    metadata = frozenset({"crow", "col"})
    crow: Tensor
    values: nn.Parameter

    def _reserve(self, rows: int, columns: int, *values: int) -> None:
        """Declare the storage of a matrix of rows x columns entries; values: its shape, [n, ...]."""
        self.values = nn.Parameter(torch.zeros(values), requires_grad=False)
        self.reserve("crow", rows + 1, dtype=torch.int32)
        self._reserve_places(rows, columns, values[0])

    def _reserve_places(self, rows: int, columns: int, number: int) -> None:
        self.reserve(self.places, number, dtype=torch.int16 if columns <= 2**15 else torch.int32)

    @staticmethod
    def _find_places(keep: Tensor) -> Tensor:
        return keep.nonzero()[:, 1]

    def _store(self, bias: Tensor | None, keep: Tensor, values: Tensor) -> Self:
        """Take over values [n, ...] of the entries where keep (bool [rows, columns]) is True, row by row."""
        self.values = nn.Parameter(values.detach().contiguous(), requires_grad=False)
        crow = nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
        return self.fill(bias, **{"crow": crow, self.places: self._find_places(keep)})

    def product(self, x: Tensor) -> Tensor:
        return self.op(x, self.crow, self.get_buffer(self.places), self.values)

    def dense_weight(self) -> Tensor:
        return self._spread(self.values).float()

    def kept(self) -> Tensor:
        return self._spread(torch.ones_like(self.values)).bool()

    def _spread(self, values: Tensor) -> Tensor:
        """Values of the kept entries as a matrix [out, in]."""
        dense: Tensor = self.op.matrix(self.crow, self.get_buffer(self.places), values).dense(self.in_features)
        return dense


class Unstructured(Compressed):
    """The kept weights of every row, `number` in all."""

    def __init__(self, in_features: int, out_features: int, number: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self._reserve(out_features, in_features, number)

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor, bias: Tensor | None = None) -> Self:
        """Hold `weight` [out, in] where `keep` (bool [out, in]) is True; values are stored in its dtype."""
        values = weight[keep]
        module = cls(weight.shape[1], weight.shape[0], len(values), bias is not None)
        return module._store(bias, keep, values)

    def config(self) -> dict[str, Any]:
        return super().config() | {"number": len(self.values)}

    def rebuilt(self, weight: Tensor) -> Self:
        """The same positions."""
        return self.of(weight.to(self.values.dtype), self.kept(), self.bias)


class CSRLinear(Unstructured):
    """Each weight with its column: 16 bits for every one that is kept."""

    op = OP


class BitmaskLinear(Unstructured):
    """One bit for every place, kept or not."""

    op = BITMASK_OP
    places = "bits"
    metadata = frozenset({"crow", "bits"})

    def _reserve_places(self, rows: int, columns: int, number: int) -> None:
        self.reserve(self.places, rows, word_count(columns, 1), dtype=torch.int32)

    @staticmethod
    def _find_places(keep: Tensor) -> Tensor:
        return pack(keep, 1)


def pack_unstructured(weight: Tensor, keep: Tensor, bias: Tensor | None = None) -> Unstructured:
    """`weight` [out, in] where `keep` (bool [out, in]) is True, in the form that takes fewer bytes."""
    out_features, in_features = weight.shape

    def count_bytes(form: type[Unstructured]) -> int:
        with torch.device("meta"):
            return sum(stored_bytes(form(in_features, out_features, int(keep.sum())), weight.dtype))

    return min((CSRLinear, BitmaskLinear), key=count_bytes).of(weight, keep, bias)
