"""One-shot pruning by a score per weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effbench.core.kinds import Weights
from effbench.core.run import Run
from effbench.core.views import Layer
from effbench.formats.sparse import Pattern
from effbench.methods.prune._common import Scope, check_pattern, from_groups, keep_largest, prune, to_groups
from effbench.nn.calibration import survey


@dataclass(frozen=True)
class Saliency(Weights):
    """One-shot pruning by a score per weight: the lowest of every comparison group go, the rest stays as it is."""

    type = "post-training"
    sparsifies = True
    must_define = (("zeros", "score"),)

    sparsity: float = 0.5  # fraction of the weights set to zero
    scope: Scope = "local"  # what is compared: a matrix, an output row (or row of blocks), or the whole model

    @property
    def zeros(self) -> str:
        """The pattern in which the zeros lie, see `Pattern`."""
        raise NotImplementedError

    def check(self) -> None:
        check_pattern(self, self.sparsity, self.zeros, self.scope)

    def check_shape(self, out: int, width: int) -> None:
        Pattern.of(self.zeros).check_shape(out, width)

    def score(self, layer: Layer) -> Tensor:
        """[out, in], not negative: the weights of the lowest scores are pruned."""
        raise NotImplementedError

    def prepare(self, run: Run) -> dict[str, Tensor] | None:
        """Which units of every linear stay when the whole model is compared; scores are those of the model as it is."""
        if self.scope != "global":
            return None
        units = {layer.name: self._units(layer) for layer in survey(run, self.needs)}
        pooled = torch.cat([part.flatten() for part in units.values()])
        keep = keep_largest(pooled.unsqueeze(0), self.sparsity).squeeze(0)
        parts = keep.split([part.numel() for part in units.values()])
        return {name: part.view_as(units[name]) for name, part in zip(units, parts, strict=True)}

    def compress(self, layer: Layer) -> nn.Module:
        keep = keep_largest(self._units(layer), self.sparsity) if layer.prepared is None else layer.prepared[layer.name]
        return prune(layer, from_groups(keep, self.zeros, layer.weight.shape), self.zeros)

    def _units(self, layer: Layer) -> Tensor:
        """Scores in comparison groups; those of weights pruned before are zero, the lowest there is."""
        score = self.score(layer)
        score = score if layer.kept is None else score * layer.kept
        return to_groups(score, self.zeros, self.scope)


@dataclass(frozen=True)
class Patterned(Saliency):
    """A saliency for every pattern. n:m fixes the sparsity at 1 - n/m; a block scores the sum over its weights."""

    pattern: str = "unstructured"  # or n:m (keep n of every m inputs of a row), such as "2:4"; or "block:RxC"

    @property
    def zeros(self) -> str:
        return self.pattern
