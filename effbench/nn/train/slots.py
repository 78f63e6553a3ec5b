"""What stands in the slots of the train plan; each class does what a fit does where its slot is empty.

A method that claims a slot inherits from the class of it and overrides what it does otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effbench.nn.train.groups import Groups, describe_group

if TYPE_CHECKING:
    from effbench.core.run import GroupReport, Run
    from effbench.nn.train.batches import Batch
    from effbench.nn.train.outputs import Outputs


class Precision:
    """In which numbers one forward pass computes, and what that asks of its gradients (`train.precision`)."""

    def forward(self, run: Run, batch: Batch | None = None) -> AbstractContextManager[Any]:
        """The context of one forward pass. It is entered anew for each: autocast keeps its 16-bit copies of weights
        until the outermost context ends, so that a model wrapped for a whole fit would never see its own updates.

        `batch` is what the pass learns from; None where a method computes what it will put into one."""
        return contextlib.nullcontext()

    def scale(self, loss: Tensor, run: Run) -> Tensor:
        """What is differentiated in place of the loss."""
        return loss

    def unscale(self, parameters: Sequence[nn.Parameter], run: Run) -> bool:
        """Bring gradients back to those of the loss, before they are clipped; whether those of this process are finite.

        A step is skipped where any process says no. It is then taken again, with the same examples and the same chance.
        """
        return True

    def settle(self, taken: bool, run: Run) -> None:
        """Told of each pass whether its gradients are used: all processes decide alike, and so all scale alike.

        Raises `Diverged` where nothing is left to try.
        """


class Rounded(Precision):
    """Sixteen bits for what is computed with; gradients and masters are float32."""

    def forward(self, run: Run, batch: Batch | None = None) -> AbstractContextManager[Any]:
        return torch.autocast(run.device.type, torch.bfloat16)


class Activations:
    """What a forward pass saves for the backward pass (`train.activations`)."""

    def saving(self, run: Run) -> AbstractContextManager[Any]:
        """A context round the steps of the fit."""
        return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Shares:
    """By what an engine divides what one process would hold between two steps of training, by its formula.

    The process is that which holds most.
    """

    parameters: float = 1
    gradients: float = 1
    optimizer: float = 1

    def sum(self, parameters: float, gradients: float, optimizer: float) -> float:
        """What one process holds between steps, of so much that one alone would hold."""
        return parameters / self.parameters + gradients / self.gradients + optimizer / self.optimizer


def find_shares(model: nn.Module, held: Callable[[nn.Parameter], float]) -> Shares:
    """Shares of an engine by which a process holds of each parameter a fraction of its own."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]

    def divide(tensors: Sequence[nn.Parameter]) -> float:
        part = sum(tensor.nbytes * held(tensor) for tensor in tensors)
        return sum(tensor.nbytes for tensor in tensors) / part if part else 1.0

    return Shares(divide(parameters), divide(trained), divide(trained))


class Parallel:
    """How several processes train one model together (`train.parallel`); here there is one."""

    def shares(self, model: nn.Module) -> Shares | None:
        """How processes divide what one would hold of a model that is whole, or whose parts tell of the whole; else
        None."""
        return Shares()

    @property
    def period(self) -> int:
        """By how many blocks models of alike blocks have to differ for each process to have as many more."""
        return 1

    def fullest(self, optimizer: Any) -> set[int]:
        """The processes of which one holds most in training: the first, which has most of what comes out uneven."""
        return {0}

    @property
    def data_ranks(self) -> int:
        """Processes that see different examples."""
        return 1

    @property
    def data_rank(self) -> int:
        """The number of this one among them. Those that share it draw the same random numbers."""
        return 0

    @property
    def lockstep(self) -> bool:
        """Whether a pass of one data rank needs one of each other: those with nothing left to learn pass along."""
        return False

    def wrap(self, run: Run) -> AbstractContextManager[Any]:
        """A context round the fit, entered before parameters are grouped: shard on entry, gather on exit."""
        return contextlib.nullcontext()

    def apart(self, run: Run) -> AbstractContextManager[Any]:
        """A context round what a method does with the examples of this process alone."""
        return contextlib.nullcontext()

    def deal(self, plain: Any) -> Any:
        """What takes the steps of an optimizer of the plan in its place, over all processes."""
        return plain

    def shard(self, places: Sequence[int]) -> list[int]:
        """Those of a step's examples that this process sees; each is seen once, none is repeated to fill up."""
        return list(places)

    def own_tokens(self, values: Tensor) -> Tensor:
        """Of values [B, T] of the tokens that the model is given those of tokens that blocks of this process see."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum of each of these numbers [N] over all data ranks."""
        return values

    def merge(self, terms: dict[str, float]) -> dict[str, float]:
        """The sum of each named number over all data ranks, of which some may lack the name."""
        return terms

    def backward(
        self,
        batch: Batch,
        feed: Callable[[Batch], Outputs],
        lose: Callable[[Batch, Outputs], Tensor],
        saving: AbstractContextManager[Any],
    ) -> None:
        """Add the gradients of a part of a step: `feed` it to the model and differentiate what it is said to `lose`.

        Both take parts of the batch as well, which count by their learned tokens; `saving` goes round what is saved
        for the backward pass.
        """
        with saving:
            loss = lose(batch, feed(batch))
        loss.backward()

    def told(self, values: Tensor) -> Tensor:
        """Numbers [N] that the process has found which computes the loss."""
        return values

    def describe(self, model: nn.Module, groups: Groups) -> tuple[int, list[GroupReport]]:
        """How many parameters the whole model has, and groups of the optimizer for the record, of all processes."""
        return sum(parameter.numel() for parameter in model.parameters()), [describe_group(group) for group in groups]

    def flops_per_token(self, flops: float, tokens: int) -> float:
        """Those of the whole model, where this process has computed so many over so many tokens; NaN: not known."""
        return flops / tokens if tokens else math.nan

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over all data ranks."""

    def agree(self, finite: bool) -> bool:
        """Whether the gradients of every process are finite, data ranks or not; all of them ask."""
        return finite

    def largest(self, values: Tensor) -> Tensor:
        """The largest of each of these numbers [N] over all processes that hold (parts of) the same modules."""
        return values

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> None:
        """Shorten the gradients to a norm of at most `most`, over all tensors wherever they lie."""
        nn.utils.clip_grad_norm_(parameters, most)
