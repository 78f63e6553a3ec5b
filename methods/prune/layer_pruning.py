"""Layer pruning: blocks that hardly turn the hidden states go (ShortGPT; Men et al., 2024; Gromov et al., 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effbench.core.errors import Diverged, Unsupported
from effbench.core.method import Method
from effbench.core.run import Run
from effbench.nn.calibration import walk
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import top_linears
from effbench.nn.model.structure import keep_blocks


@torch.no_grad()
def block_influence(run: Run) -> list[float]:
    """Of every block, 1 - cos(input, output), the mean over all calibration tokens; no final norm in the output."""
    influence = []
    for block in walk(run, {"raw"}):
        block.outputs = block.forward()
        pairs = zip(block.hidden, block.outputs, strict=True)
        cosines = torch.cat([_cosine(before[0], after[0]) for before, after in pairs])
        influence.append(float(1 - cosines.mean()))
    return _finite(influence)


@torch.no_grad()
def angular_distance(run: Run, number: int) -> list[float]:
    """Of every run of `number` blocks but those that end with the last, the angle in units of pi between the inputs
    of its first block and of the block behind it; the mean over calibration sequences, at their last tokens."""
    last = []
    for block in walk(run, {"raw"}):
        last.append(torch.cat([hidden[:, -1] for hidden in block.hidden]))  # [sequences, H]
        block.outputs = block.forward()
    pairs = zip(last, last[number:], strict=False)
    angles = [_cosine(before, after).clamp(-1, 1).arccos().mean() / math.pi for before, after in pairs]
    return _finite([float(angle) for angle in angles])


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1)


def _finite(scores: list[float]) -> list[float]:
    if not all(map(math.isfinite, scores)):
        raise Diverged("hidden states are not finite during calibration")
    return scores


@dataclass(frozen=True)
class LayerPruning(Method):
    """One shot: blocks are scored once, in the whole model.

    `block_influence` (ShortGPT) removes the blocks with the lowest 1 - cos, wherever they stand. `angular` (Gromov et
    al., arXiv:2403.17887) removes the contiguous run of blocks between whose ends the hidden state of the last token
    turns least, never the final block. A block with a linear that is to be left alone stays.
    """

    paper = "arXiv:2403.03853"
    published = "layer_pruning()"
    type = "post-training"
    weight_update = "none"
    needs = {"raw"}
    settles = True
    identity = {"fraction": 0.0}

    fraction: float = 0.25  # of the blocks, rounded to the nearest whole number, halves up
    score: Literal["block_influence", "angular"] = "block_influence"  # what says how little a block does

    def check(self) -> None:
        self.require(0 <= self.fraction < 1, "fraction must be in [0, 1)")

    def apply(self, run: Run) -> None:
        if self.fraction == 0:
            return
        view = Blocks(run.model)
        number = math.floor(self.fraction * len(view) + 0.5)
        if number == 0:
            raise Unsupported(f"less than half of one of {len(view)} blocks")
        free = [
            all(run.targeted(path) for path, _ in top_linears(block, view.path(index, "")[:-1]))
            for index, block in enumerate(view.blocks)
        ]
        if self.score == "angular":
            scores, removed = self._contiguous(run, number, free)
        else:
            scores, removed = self._lowest(run, number, free)
        keep_blocks(view, [index for index in range(len(view)) if index not in removed])
        run.log.removed.append({"step": str(self), "blocks": removed, self.score: scores})

    def _lowest(self, run: Run, number: int, free: list[bool]) -> tuple[list[float], list[int]]:
        candidates = [index for index, may_go in enumerate(free) if may_go]
        if number > min(len(candidates), len(free) - 1):
            raise Unsupported(f"{number} blocks of {len(free)}, {len(candidates)} of which may go but not all")
        influence = block_influence(run)
        return influence, sorted(sorted(candidates, key=influence.__getitem__)[:number])

    def _contiguous(self, run: Run, number: int, free: list[bool]) -> tuple[list[float], list[int]]:
        starts = [start for start in range(len(free) - number) if all(free[start : start + number])]
        if not starts:
            raise Unsupported(f"there are no {number} blocks in a row before the last that may go")
        distance = angular_distance(run, number)
        start = min(starts, key=distance.__getitem__)
        return distance, list(range(start, start + number))
