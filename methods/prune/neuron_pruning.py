"""Neuron pruning: MLP neurons go as coupled slices of gate, up and down (LLM-Pruner; Ma et al., 2023)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effbench.core.errors import Diverged, Unsupported
from effbench.core.method import Method, Need
from effbench.core.run import Run
from effbench.core.views import Layer
from effbench.nn.calibration import survey
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.structure import find_cuttable, keep_neurons, neurons, settle_width

NEEDS: dict[str, Set[Need]] = {
    "taylor": {"grad"},
    "taylor_vector": {"grad"},
    "magnitude": set(),
    "activation": {"norm"},
}


@dataclass(frozen=True)
class NeuronPruning(Method):
    """Scores of a neuron, of the row of gate and up and the column of down that are its own:

    `taylor`          sum of |w * dL/dw| over all its weights: LLM-Pruner's `param_first`, the element-wise estimate
    `taylor_vector`   sum over its three vectors of |sum of w * dL/dw|: LLM-Pruner's `vectorize`
    `magnitude`       sum of w^2 over all its weights
    `activation`      ||h|| * mean |w| of down alone, h its activations (Wanda-sp, arXiv:2312.11983)

    The gradient is that of the mean loss over the calibration sequences. Biases go with their neurons and have no
    part in scores. The authors spare the first and last blocks, which patterns of linears to skip do here. The same
    width everywhere (`scope="local"`, nothing skipped) is a model that plain transformers can load.
    """

    paper = "arXiv:2305.11627"
    caveats = (
        "neurons of every block alone; LLM-Pruner also prunes heads, spares the outer blocks and trains LoRA after",
    )
    type = "post-training"
    weight_update = "none"
    settles = True
    identity = {"sparsity": 0.0}

    sparsity: float = 0.2  # fraction of the neurons; int(width * (1 - sparsity)) stay, as with the authors
    score: Literal["taylor", "taylor_vector", "magnitude", "activation"] = "taylor"  # what a neuron is worth
    scope: Literal["local", "global"] = "local"  # compare within each block, or over the whole model
    multiple: int = 1  # widths are rounded up to a multiple, as group-wise quantization or tensor cores may want

    @property
    def needs(self) -> Set[Need]:
        """Statistics that the score takes."""
        return NEEDS[self.score]

    def check(self) -> None:
        self.require(0 <= self.sparsity < 1, "sparsity must be in [0, 1)")
        self.require(self.multiple > 0, "multiple must be at least 1")

    def apply(self, run: Run) -> None:
        if self.sparsity == 0:
            return
        view = Blocks(run.model)
        chosen = find_cuttable(run, view, (*view.names.up, view.names.down))
        scores = self.scores(run, view, chosen)
        widths = self._widths(scores)
        for index, width in widths.items():
            if width == 0:
                raise Unsupported(f"{view.path(index, view.names.down)}: no neuron would be left")
        removed = {index: len(scores[index]) - width for index, width in widths.items() if width < len(scores[index])}
        if not removed:
            raise Unsupported("less than one neuron of any block")
        for index, number in removed.items():
            keep_neurons(view, index, scores[index].argsort(stable=True)[number:].sort().values)
        settle_width(view)
        counts = {view.path(index, view.names.down): number for index, number in removed.items()}
        run.log.removed.append({"step": str(self), "neurons": counts})

    def scores(self, run: Run, view: Blocks, chosen: list[int]) -> dict[int, Tensor]:
        """[width] of each chosen block; the neurons of the lowest scores are pruned."""
        scores = {index: torch.zeros(neurons(view, index), device=run.device) for index in chosen}
        place = {view.path(index, name): index for index in chosen for name in (*view.names.up, view.names.down)}
        for layer in survey(run, self.needs):
            if layer.name in place:
                scores[place[layer.name]] += self._part(layer, down=layer.name.endswith(view.names.down))
        for index, score in scores.items():
            if not torch.isfinite(score).all():
                raise Diverged(f"{view.path(index, view.names.down)}: scores are not finite")
        return scores

    def _part(self, layer: Layer, down: bool) -> Tensor:
        """[width]: what a neuron's vector in one linear adds to its score."""
        weight = layer.weight.T if down else layer.weight  # [width, other]
        if self.score == "magnitude":
            return weight.square().sum(1)
        if self.score == "activation":
            return layer.inputs.norm * weight.abs().mean(1) if down else weight.new_zeros(len(weight))
        salience = weight * (layer.inputs.grad.T if down else layer.inputs.grad)
        return salience.abs().sum(1) if self.score == "taylor" else salience.sum(1).abs()

    def _widths(self, scores: dict[int, Tensor]) -> dict[int, int]:
        """Neurons that stay in each block."""
        if self.scope == "local":
            stay = {index: self._stay(len(score)) for index, score in scores.items()}
        else:
            owner = torch.cat([torch.full_like(score, index) for index, score in scores.items()])
            order = torch.cat(list(scores.values())).argsort(stable=True)
            kept = owner[order[len(order) - self._stay(len(order)) :]]
            stay = {index: int((kept == index).sum()) for index in scores}
        return {i: min(-(-number // self.multiple) * self.multiple, len(scores[i])) for i, number in stay.items()}

    def _stay(self, number: int) -> int:
        return int(number * (1 - self.sparsity) + 1e-9)
