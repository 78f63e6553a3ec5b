"""What methods share that compare a student with its teacher layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.nn.model.blocks import Blocks
from effbench.nn.train.loss import learned, token_weights


def map_layers(run: Run, teacher: str, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
    """The teacher's block, from 0, for each block of the student: those chosen, else those at the same relative depth.

    Uniform as the g(m) = 3m of TinyBERT (arXiv:1909.10351), whose students of 4 blocks follow every third of 12.
    Raises `Unsupported` where those chosen do not fit.
    """
    student, number = len(Blocks(run.model)), len(Blocks(run.role(teacher)))
    if chosen is None:
        return tuple(max(0, round((i + 1) * number / student) - 1) for i in range(student))
    if len(chosen) != student or max(chosen) >= number:
        raise Unsupported(
            f"layers={chosen}: the student has {student} blocks, each needs one of the {number} of {teacher}, from 0"
        )
    return chosen


class Examples:
    """The examples of a batch: sums over their real tokens, prompts too, and means over the examples.

    An example counts by its learned tokens and their weights. So a batch has the mean of its rows alone, whatever pads
    or packs them, and it does not matter how a step is cut.
    """

    def __init__(self, batch: dict[str, Tensor]) -> None:
        owner = batch["example"]
        self.real = owner >= 0  # bool [B, T]
        taught = owner[:, 1:][learned(batch)]
        examples = taught.unique()
        weights = token_weights(batch)
        counts = torch.ones(len(taught), device=owner.device) if weights is None else weights
        self._share = (taught == examples[:, None]).to(counts) @ counts
        self._member = owner[self.real] == examples[:, None]  # [E, N]

    def sum(self, values: Tensor) -> Tensor:
        """[E]: of each example, from values [N] of the real tokens."""
        return self._member.to(values) @ values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the examples, of values [E]."""
        share = self._share.to(values)
        return values @ share / share.sum()


def widen(x: Tensor) -> Tensor:
    """The same numbers in float32 at least, in which errors are summed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
