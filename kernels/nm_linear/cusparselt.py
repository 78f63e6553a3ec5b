"""`nm_linear` of 2:4 matrices by the vendor's sparse matrix product.

It has a layout of its own, so every matrix is compressed a second time when it is first used, and that copy lives as
long as the matrix: memory is paid for speed where there are many rows of x. Without a GPU only the way
to the library and back has been tested.
"""

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT
from torch.utils.weak import WeakTensorKeyDictionary

from effbench.kernels._common.launch import flatten_rows
from effbench.kernels._common.nm import columns, scatter
from effbench.kernels.nm_linear.reference import NmMatrix
from effbench.ops import Declined

KERNELS = r"spars"  # in the names of the library's kernels, as traces have them
FEWEST_ROWS = 16  # of x; with fewer, the product is one with padding, and reading the stored form once is cheaper


@dataclass(frozen=True)
class _Compressed:
    """The vendor's form of a matrix, and what it was made from."""

    packed: Tensor
    places: weakref.ref[Tensor]
    versions: tuple[int, int]


_known: MutableMapping[Tensor, _Compressed] = WeakTensorKeyDictionary()  # by values


def nm_linear(x: Tensor, matrix: NmMatrix) -> Tensor:
    """See `NmMatrix`; Declined for all but 2:4, 16 bits and sizes that cuSPARSELt takes, and without it."""
    values, places, n, m = matrix
    flat = flatten_rows(x)
    rows, in_features = flat.shape
    if (n, m) != (2, 4) or x.dtype not in (torch.bfloat16, torch.float16) or values.dtype != x.dtype:
        raise Declined("needs 2:4 and 16-bit numbers of one type")
    if rows < FEWEST_ROWS:
        raise Declined(f"needs {FEWEST_ROWS} rows of x")
    least = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[x.dtype]
    if len(values) % least.sparse_min_rows or in_features % least.sparse_min_cols:
        raise Declined(f"needs sizes in multiples of {least.sparse_min_rows} and {least.sparse_min_cols}")
    if not _has_cusparselt(x.device):
        raise Declined("no cuSPARSELt here")
    packed = _compress(values, places, in_features)
    padded = torch.nn.functional.pad(flat, (0, 0, 0, -rows % least.dense_min_rows))
    y = torch._cslt_sparse_mm(packed, padded.T, transpose_result=True)[:rows]
    return y.reshape(*x.shape[:-1], len(values))


def _has_cusparselt(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.backends.cusparselt.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _compress(values: Tensor, places: Tensor, in_features: int) -> Tensor:
    """The vendor's form of the matrix, made anew when the tensors have changed; Declined inside a graph capture."""
    if values.is_inference() or places.is_inference():
        raise Declined("changes of inference tensors cannot be noticed")
    versions = values._version, places._version
    kept = _known.get(values)
    if kept is not None and kept.places() is places and kept.versions == versions:
        return kept.packed
    if torch.cuda.is_current_stream_capturing():
        raise Declined("not compressed yet, and a capture would only note down how to")
    packed = torch._cslt_compress(scatter(values, columns(places, in_features, 2, 4), in_features))
    _known[values] = _Compressed(packed, weakref.ref(places), versions)
    return packed
