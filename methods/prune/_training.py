"""Linears under a mask that changes while a fit goes on, and the context that puts them in place."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.formats.sparse import PrunedLinear
from effbench.nn.model.blocks import dense_linears
from effbench.nn.model.linear import Replaced, kept, rebuilt, replace

Groups = list[dict[str, Any]]


class TrainedMask(Replaced):
    """y = x (W * gate)^T + b. W and b stay the parameters of the linear that it stands for, and are trained in it."""

    def __init__(self, linear: nn.Module, path: str, seed: int) -> None:
        weight = _weight(linear)
        super().__init__(weight.shape[1], weight.shape[0])
        self.linear = linear
        self.bias = linear.bias  # type: ignore[assignment]
        self.held = kept(linear)  # False where an earlier step put a zero
        self.path = path
        self.seed = seed
        # Optimizer steps taken, and those of the whole fit: in the model, so that a checkpoint holds them.
        self.register_buffer("clock", torch.tensor([0, 1]))

    clock: Tensor

    @property
    def progress(self) -> float:
        """Fraction of the fit that is done."""
        return float(self.clock[0] / self.clock[1])

    @property
    def weight(self) -> Tensor:
        """[out, in]: a view of the linear's own weight."""
        return _weight(self.linear)

    def gate(self) -> Tensor:
        """[out, in]: what the weights are multiplied by in this step."""
        raise NotImplementedError

    def result(self) -> tuple[Tensor, Tensor]:
        """Weight [out, in] and bool mask [out, in] that remain after the fit."""
        raise NotImplementedError

    def rank_pruned_last(self, score: Tensor) -> Tensor:
        """`score` [out, in] with the zeros of earlier steps just below everything else."""
        if self.held is None:
            return score
        return score.masked_fill(~self.held, float(score.min().nextafter(score.new_tensor(-torch.inf))))

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers of this step and linear; the same ones when a checkpointed block is computed again."""
        generator = torch.Generator(self.weight.device)
        return generator.manual_seed(zlib.crc32(f"{self.seed}/{self.path}/{int(self.clock[0])}/{purpose}".encode()))

    def dense_weight(self) -> Tensor:
        return (self.weight * self.gate()).detach().float()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.gate().to(self.weight.dtype), self.bias)

    def finish(self, pattern: str) -> nn.Module:
        """What stays in the model: a `PrunedLinear`, or a linear of the old kind where nothing was pruned."""
        weight, keep = self.result()
        keep = keep if self.held is None else keep & self.held
        if bool(keep.all()):
            return self.linear if torch.equal(weight, self.weight) else rebuilt(self.linear, weight.detach())
        module = PrunedLinear.of(weight.detach().contiguous(), keep, self.bias, pattern)
        return train_like(self.linear, module)


Masked = TypeVar("Masked", bound=TrainedMask)


def trainable_linears(run: Run) -> dict[str, nn.Module]:
    """The linears that a method may replace, by path.

    Raises `Unsupported` where there is none, or where one has no dense weights that could be trained.
    """
    linears = dense_linears(run)
    if not linears:
        raise Unsupported("every linear is skipped: there is nothing to prune")
    return linears


@contextlib.contextmanager
def mask_linears(run: Run, make: Callable[[nn.Module, str, int], Masked], pattern: str) -> Iterator[list[Masked]]:
    """Have `make(linear, path, seed)` stand for every linear during a fit and leave `PrunedLinear`s behind.

    If the fit raises, the linears themselves are put back. Raises `Unsupported` where one cannot be masked.
    """
    final = trainable_linears(run)
    masks = {path: make(linear, path, run.seed) for path, linear in final.items()}
    try:
        for path, module in masks.items():
            replace(run.model, path, module)
        yield list(masks.values())
        final = {path: module.finish(pattern) for path, module in masks.items()}
    finally:
        for path, linear in final.items():
            replace(run.model, path, linear)


def train_like(old: nn.Module, new: nn.Module) -> nn.Module:
    """`new`, its parameters trainable where those of the same name in `old` are."""
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(old.get_parameter(name).requires_grad)
    return new


def find_masks(run: Run, kind: type[Masked]) -> list[Masked]:
    """The masks of one kind that are in the model now."""
    return [module for module in run.model.modules() if isinstance(module, kind)]


@contextlib.contextmanager
def freeze(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for `parameters` inside."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def split_group(groups: Groups, parameters: Iterable[nn.Parameter], **settings: Any) -> Groups:
    """`groups` with `parameters` taken out into one group of their own with its `settings`."""
    own = list(parameters)
    ids = {id(parameter) for parameter in own}
    rest = [group | {"params": [p for p in group["params"] if id(p) not in ids]} for group in groups]
    return [*rest, {"params": own, **settings}]


def _weight(linear: nn.Module) -> Tensor:
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.T if isinstance(linear, Conv1D) else weight
