"""Pipeline parallel: blocks are divided over processes, which pass parts of a batch on (GPipe, Huang et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from effbench.methods.parallel._ranks import Ranks
from effbench.nn.train.pipeline import Pipeline
from effbench.nn.train.slots import Parallel


@dataclass(frozen=True)
class PP(Ranks):
    """Each rank holds consecutive blocks; the first one embeddings too, and the last one the head and the loss.

    A batch is cut into micro-batches, which follow each other through the stages; gradients add up, so that a step is
    what it is on one rank (section 2.2 of the paper). Stages stand idle for (K - 1) / (M + K - 1) of the time, of K
    stages and M micro-batches.
    """

    paper = "arXiv:1811.06965"
    caveats = (
        "blocks are divided by their number; the paper balances the estimated cost of stages",
        "activations are kept; checkpointing(), which the paper has in every stage, is a step of its own",
        "published for AmoebaNet and a translation Transformer of up to 84 billion weights",
    )
    type = "parallel training"
    weight_update = "training"
    claims = ("train.parallel",)
    trials = ({"ranks": 1},)

    microbatches: int = 4  # of a batch; those of as few examples as there may be are fewer
    schedule: Literal["gpipe", "1f1b"] = "gpipe"  # all forward passes first, or each backward pass as soon as it can be

    def check(self) -> None:
        super().check()
        self.require(self.microbatches > 0, "microbatches must be at least 1")

    def slot_values(self) -> dict[str, Any]:
        if self.ranks == 1:
            return {"parallel": Parallel()}
        return {"parallel": Pipeline(str(self), self.ranks, self.microbatches, self.schedule)}
