"""Band filter: in each epoch the examples of the lowest and of the highest losses are left out.

A rule without a paper, sometimes called D2 pruning, which is another; a cut-off of the hardest examples, at fixed
scores, is part of coverage-centric selection (Zheng et al., 2023, arXiv:2210.15809).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.train.examples import measure_losses
from effbench.nn.train.passes import score_losses
from effbench.nn.train.samplers import Shuffled


@dataclass(frozen=True)
class BandFilter(Select):
    """An epoch reads, in random order, the examples whose last known loss is neither among the lowest nor the highest.

    Before the first epoch all losses are measured; from then on those of examples that are read are taken from the
    fit. So what was left out keeps its loss, and is read again when others have come below or above it.
    """

    paper = "unpublished"
    caveats = ("an example that is left out keeps the loss that it had when it was last read",)
    type = "data selection"
    tuned = {"low": (0.0, 0.1, 0.2), "high": (0.1, 0.2, 0.3)}

    low: float = 0.1  # share of the examples that is left out as too easy
    high: float = 0.1  # and as too hard

    def check(self) -> None:
        super().check()
        self.require(min(self.low, self.high) >= 0 and self.low + self.high < 1, "low and high leave nothing")

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        """[N] nearness to the middle of the band, by ranks of the losses: what a share to keep is cut by."""
        rank = score_losses(run, "band", run.model, examples).argsort(stable=True).argsort()
        middle = (self.low + 1 - self.high) / 2 * len(examples)
        return -(rank + 0.5 - middle).abs()

    def sampler(self, examples: Sequence[Example], run: Run) -> Any:
        return InBand(examples, run, self)


class InBand:
    """What `band_filter` draws from. Its state: the last known losses [N], and what the present epoch reads."""

    def __init__(self, examples: Sequence[Example], run: Run, method: BandFilter) -> None:
        self.run = run
        self.state = run.state(method)
        self.easy, self.hard = round(method.low * len(examples)), round(method.high * len(examples))
        self.kept = max(1, len(examples) - self.easy - self.hard)
        self.state.clear()
        self.state |= {"losses": measure_losses(run, run.model, examples), "epoch": -1, "places": []}

    def draw(self, step: int, batch_size: int) -> list[int]:
        """The next batch; the last of an epoch may be smaller."""
        epoch, number = divmod(step, -(-self.kept // batch_size))
        if epoch != self.state["epoch"]:
            places = self.state["losses"].argsort(stable=True)[self.easy : self.easy + self.kept].sort().values
            order = Shuffled(self.kept, self.run.seed).draw(epoch, self.kept)
            self.state |= {"epoch": epoch, "places": places[order].tolist()}
        places_read: list[int] = self.state["places"][number * batch_size : (number + 1) * batch_size]
        return places_read

    def seen(self, places: Sequence[int], losses: Tensor) -> None:
        """Take note of losses [B] of examples that were read."""
        self.state["losses"][torch.as_tensor(places)] = losses.float().cpu()
