"""What a fit sums over the parts of a step, and in which numbers batches are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys_training import fit

from effbench.checks import toy_run
from effbench.core.recipe import parse_step
from effbench.core.run import Run


class Counting:
    """Tallies the examples of each part and their tokens."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.totals: list[list[float]] = []
        self.types: set[torch.dtype] = set()

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        counts = [len(batch["input_ids"]), int((batch["labels"] != -100).sum())]
        self.parts.append(torch.tensor(counts, dtype=torch.float64))
        self.types.add(run.model(batch["input_ids"]).logits.dtype)
        return batch | {"tally": self.parts[-1]}

    @property
    def reads(self) -> dict[str, Any]:
        return {}

    short_key = "counting"

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        self.totals.append(batch["tally"].tolist())
        return {"nothing": 0 * out.logits.sum()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_tallies_come_to_the_loss_as_sums_over_the_step(accumulate: int) -> None:
    run, counting = toy_run(), Counting()
    for hook in ("batch", "loss"):
        run.train.chain(hook).append(counting)
    fit(run, steps=2, accumulate=accumulate)
    whole = torch.stack(counting.parts).view(2, accumulate if accumulate == 1 else 2, 2).sum(1)
    assert counting.totals == [total for total in whole.tolist() for _ in range(len(counting.parts) // 2)]
    assert whole[0, 0] == 4


def test_batches_are_made_in_the_precision_of_the_fit() -> None:
    run, counting = toy_run(), Counting()
    run.apply(parse_step("bf16()"))
    for hook in ("batch", "loss"):
        run.train.chain(hook).append(counting)
    fit(run, steps=1)
    assert counting.types == {torch.bfloat16}
