"""What methods share that compare a student with its teacher layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.nn.model.blocks import Blocks
from effbench.nn.train.loss import learned, token_weights


@dataclass(frozen=True)
class ByLayer(Train):
    """Adds one term, beta times the sum over the student's blocks of how far each is from one of the teacher's."""

    must_define = (("loss",),)
    type = "distillation"
    weight_update = "training"
    tuned = {"beta": (0.1, 1.0)}

    beta: float = 1.0  # weight of the term
    layers: tuple[int, ...] | None = None  # teacher's block, from 0, for each of the student; None: at the same depth
    teacher: str = "reference"  # role of the teacher: the unchanged model, or the name of a snapshot

    def check(self) -> None:
        self.require(self.beta > 0, "beta must be above 0")
        self.require(self.layers is None or min(self.layers, default=-1) >= 0, "layers are numbers from 0 on")
        self.require_teacher(self.teacher)

    def map_layers(self, run: Run) -> tuple[int, ...]:
        """The teacher's block for each of the student: those chosen, else those at the same relative depth.

        Uniform as the g(m) = 3m of TinyBERT (arXiv:1909.10351), whose students of 4 blocks follow every third of 12.
        Raises `Unsupported` where those chosen do not fit.
        """
        student, number = len(Blocks(run.model)), len(Blocks(run.role(self.teacher)))
        if self.layers is None:
            return tuple(max(0, round((i + 1) * number / student) - 1) for i in range(student))
        if len(self.layers) != student or max(self.layers) >= number:
            raise Unsupported(
                f"layers={self.layers}: the student has {student} blocks, each needs one of the {number} of "
                f"{self.teacher}, from 0"
            )
        return self.layers

    def weigh(self, errors: Sequence[Tensor], run: Run) -> Tensor:
        """The term, of the error of each block; the log has them one by one."""
        run.watched.update({f"layer_{layer}": error for layer, error in enumerate(errors)})
        return self.beta * torch.stack([*errors]).sum()


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
