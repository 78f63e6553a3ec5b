"""What the pruning methods share: patterns, comparison groups and masks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.core.method import Method
from effbench.core.views import Layer
from effbench.formats.packed import Packed
from effbench.formats.sparse import Pattern, PrunedLinear
from effbench.nn.model.linear import dense_weight

Scope = Literal["local", "row", "global"]


def check_pattern(method: Method, sparsity: float, pattern: str, scope: Scope = "local") -> None:
    """Raise `Usage` unless `sparsity`, `pattern` and `scope` can be meant together."""
    method.require(0 <= sparsity < 1, "sparsity must be in [0, 1)")
    try:
        kind, n, m = Pattern.of(pattern)
    except ValueError as error:
        method.require(False, str(error))
    if kind == "n:m":
        method.require(
            abs(sparsity - (1 - n / m)) < 1e-9, f"pattern {pattern} means sparsity {1 - n / m:g}, not {sparsity:g}"
        )
        method.require(
            scope != "global", f"pattern {pattern} compares within every {m} weights, which scope='global' contradicts"
        )


def to_groups(score: Tensor, pattern: str, scope: Scope) -> Tensor:
    """`score` [out, in] as [groups, units]: what is compared with each other lies in one row.

    A unit is a weight, or a block with the sum of its weights' scores. The pattern must divide the matrix, see
    `Pattern.check_shape`.
    """
    out, width = score.shape
    kind, first, second = Pattern.of(pattern)
    if kind == "n:m":
        return score.unflatten(1, (-1, second)).flatten(0, 1)
    if kind == "block":
        score = score.view(out // first, first, width // second, second).sum((1, 3))
    return score if scope == "row" else score.reshape(1, -1)


def from_groups(keep: Tensor, pattern: str, shape: torch.Size) -> Tensor:
    """The mask [out, in] of what `to_groups` took apart."""
    kind, rows, columns = Pattern.of(pattern)
    if kind != "block":
        return keep.reshape(shape)
    blocks = keep.reshape(shape[0] // rows, shape[1] // columns)
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def keep_largest(groups: Tensor, sparsity: float) -> Tensor:
    """Bool [groups, units]: False for the lowest int(units * sparsity) of every row; of equal ones the earlier go."""
    number = int(groups.shape[1] * sparsity + 1e-9)
    if not number:
        return torch.ones_like(groups, dtype=torch.bool)
    last = groups.kthvalue(number, 1, keepdim=True).values
    ties = groups == last
    spare = number - (groups < last).sum(1, keepdim=True)
    return (groups > last) | (ties & (ties.cumsum(1) > spare))


def keep_mask(score: Tensor, sparsity: float, pattern: str = "unstructured", scope: Scope = "local") -> Tensor:
    """Bool [out, in]: False for the lowest scores of every comparison group; `scope` "local" or "row"."""
    return from_groups(keep_largest(to_groups(score, pattern, scope), sparsity), pattern, score.shape)


def prune(layer: Layer, keep: Tensor, pattern: str, weight: Tensor | None = None) -> nn.Module:
    """The layer's weights (or `weight` [out, in]) where `keep` [out, in] is True; earlier zeros stay.

    A packed layer keeps its codes and scales. Raises `Unsupported` where those have no zero.
    """
    keep = keep if layer.kept is None else keep & layer.kept
    if weight is None:
        weight = layer.weight
        if bool(keep.all()):
            return layer.module
    floats = next((parameter for name, parameter in layer.module.named_parameters() if name != "bias"), None)
    if floats is not None:
        return PrunedLinear.of(weight.to(floats.dtype), keep, layer.bias, pattern)
    if isinstance(layer.module, Packed) and layer.module.maskable:
        packed = layer.module.rebuilt(weight * keep)
        if isinstance(packed, Packed) and not dense_weight(packed)[~keep].any():
            return packed.hold(keep)
    raise Unsupported(f"{layer.name}: {type(layer.module).__name__} cannot hold zeros; prune before compressing")
