"""What the pruning methods share: comparison groups, masks, and one-shot pruning by a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.core.kinds import Weights
from effbench.core.method import Method
from effbench.formats.packed import Packed
from effbench.formats.sparse import Pattern, PrunedLinear
from effbench.nn.calibration import Layer, survey
from effbench.nn.model.linear import dense_weight

if TYPE_CHECKING:
    from effbench.core.run import Run
    from effbench.nn.run import ModelRun

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


def grouped(score: Tensor, pattern: str, scope: Scope, name: str) -> Tensor:
    """`score` [out, in] as [groups, units]: what is compared with each other lies in one row.

    A unit is a weight, or a block with the sum of its weights' scores. Raises `Unsupported` where the matrix does
    not divide.
    """
    out, width = score.shape
    kind, first, second = Pattern.of(pattern)
    if kind == "n:m":
        if width % second:
            raise Unsupported(f"{name}: width {width} is not a multiple of {second}, as pattern {pattern} needs")
        return score.reshape(-1, second)
    if kind == "block":
        if out % first or width % second:
            raise Unsupported(f"{name}: {out} x {width} does not divide into blocks of {first} x {second}")
        score = score.view(out // first, first, width // second, second).sum((1, 3))
    return score if scope == "row" else score.reshape(1, -1)


def ungrouped(keep: Tensor, pattern: str, shape: torch.Size) -> Tensor:
    """The mask [out, in] of what `grouped` took apart."""
    kind, rows, columns = Pattern.of(pattern)
    if kind != "block":
        return keep.reshape(shape)
    blocks = keep.reshape(shape[0] // rows, shape[1] // columns)
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def largest(groups: Tensor, sparsity: float) -> Tensor:
    """Bool [groups, units]: False for the lowest int(units * sparsity) of every row; of equal ones the earlier go."""
    number = int(groups.shape[1] * sparsity + 1e-9)
    if not number:
        return torch.ones_like(groups, dtype=torch.bool)
    last = groups.kthvalue(number, 1, keepdim=True).values
    ties = groups == last
    spare = number - (groups < last).sum(1, keepdim=True)
    return (groups > last) | (ties & (ties.cumsum(1) > spare))


def keep_mask(
    score: Tensor, sparsity: float, pattern: str = "unstructured", scope: Scope = "local", name: str = "layer"
) -> Tensor:
    """Bool [out, in]: False for the lowest scores of every comparison group; `scope` "local" or "row".

    Raises `Unsupported` where the matrix does not divide by the pattern.
    """
    return ungrouped(largest(grouped(score, pattern, scope, name), sparsity), pattern, score.shape)


def pruned(layer: Layer, keep: Tensor, pattern: str, weight: Tensor | None = None) -> nn.Module:
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
            return packed.holding(keep)
    raise Unsupported(f"{layer.name}: {type(layer.module).__name__} cannot hold zeros; prune before compressing")


@dataclass(frozen=True)
class Saliency(Weights):
    """One-shot pruning by a score per weight: the lowest of every comparison group go, the rest stays as it is."""

    type = "post-training"
    must_define = (("zeros", "score"),)

    sparsity: float = 0.5  # fraction of the weights set to zero
    scope: Scope = "local"  # what is compared: a matrix, an output row (or row of blocks), or the whole model

    @property
    def zeros(self) -> str:
        """The pattern in which the zeros lie, see `Pattern`."""
        raise NotImplementedError

    def check(self) -> None:
        check_pattern(self, self.sparsity, self.zeros, self.scope)

    def score(self, layer: Layer) -> Tensor:
        """[out, in], not negative: the lower, the sooner a weight goes."""
        raise NotImplementedError

    def prepare(self, run: Run) -> dict[str, Tensor] | None:
        """Which units of every linear stay when the whole model is compared; scores are those of the model as it is."""
        if self.scope != "global":
            return None
        units = {layer.name: self._units(layer) for layer in survey(cast("ModelRun", run), set(self.needs))}
        pooled = torch.cat([part.flatten() for part in units.values()])
        keep = largest(pooled.unsqueeze(0), self.sparsity).squeeze(0)
        parts = keep.split([part.numel() for part in units.values()])
        return {name: part.view_as(units[name]) for name, part in zip(units, parts, strict=True)}

    def compress(self, layer: Layer) -> nn.Module:
        keep = largest(self._units(layer), self.sparsity) if layer.prepared is None else layer.prepared[layer.name]
        return pruned(layer, ungrouped(keep, self.zeros, layer.weight.shape), self.zeros)

    def _units(self, layer: Layer) -> Tensor:
        """Scores in comparison groups; those of weights pruned before are zero, the lowest there is."""
        score = self.score(layer)
        score = score if layer.kept is None else score * layer.kept
        return grouped(score, self.zeros, self.scope, layer.name)


@dataclass(frozen=True)
class Patterned(Saliency):
    """A saliency for every pattern. n:m fixes the sparsity at 1 - n/m; a block scores the sum over its weights."""

    pattern: str = "unstructured"  # or n:m (keep n of every m inputs of a row), such as "2:4"; or "block:RxC"

    @property
    def zeros(self) -> str:
        return self.pattern
