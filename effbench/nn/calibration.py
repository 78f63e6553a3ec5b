"""Layer-by-layer calibration that streams: one block's activations at a time.

Held at any moment: the hidden states of the calibration set at one block's input, and that block's statistics.
Linears that share an input share its statistics. Padding never counts.
"""

from __future__ import annotations

import contextlib
import copy
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Diverged, Refused, Unsupported
from effbench.core.views import Layer, SharedInput
from effbench.nn.model.blocks import Blocks, dense_linears
from effbench.nn.model.feed import feed
from effbench.nn.model.linear import dense_bias, dense_weight, kept
from effbench.nn.train.loss import cross_entropy

if TYPE_CHECKING:
    from effbench.core.run import Run

RAW_TOKENS = 4096  # tokens kept verbatim for methods that need them
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {  # what is averaged over sequences, by need
    "grad": lambda gradient: gradient,
    "grad_abs": torch.abs,
    "grad2": torch.square,
}


class Inputs:
    """Statistics of what a linear receives during calibration; only what the method needs is gathered."""

    def __init__(self, needs: Set[str], total: int) -> None:
        self.needs = needs
        self.count = 0  # tokens seen, padding excluded
        self._every = max(1, total // RAW_TOKENS)
        self._square: Tensor | None = None
        self._absolute: Tensor | None = None
        self._outer: Tensor | None = None
        self._raw: list[Tensor] = []
        self._scale: Tensor | None = None  # [in], what inputs are divided by since they were seen
        # [out, in] means over sequences of the loss gradients, of their magnitudes and of their squares
        self.grad: Tensor
        self.grad_abs: Tensor
        self.grad2: Tensor

    def add(self, x: Tensor) -> None:
        """Take in tokens [N, in]."""
        x = x.float()
        if "norm" in self.needs:
            square, absolute = x.double().square().sum(0), x.abs().double().sum(0)
            self._square = square if self._square is None else self._square + square
            self._absolute = absolute if self._absolute is None else self._absolute + absolute
        if "hessian" in self.needs:
            outer = x.T @ x
            self._outer = outer.double() if self._outer is None else self._outer.add_(outer)
        if "raw" in self.needs:
            self._raw.append(x[-self.count % self._every :: self._every].clone())
        self.count += len(x)

    def divided(self, scale: Tensor) -> Inputs:
        """The statistics of inputs divided by `scale` [in]."""
        inputs = copy.copy(self)
        inputs._scale = scale
        return inputs

    @property
    def norm(self) -> Tensor:
        """[in]: L2 norm over all tokens."""
        return self._divide(self._require(self._square, "norm").sqrt().float())

    @property
    def mean_abs(self) -> Tensor:
        """[in]: mean of |x| over all tokens."""
        return self._divide((self._require(self._absolute, "norm") / self.count).float())

    @property
    def second_moment(self) -> Tensor:
        """[in, in] float64: mean of x x^T over all tokens."""
        moment = self._require(self._outer, "hessian") / self.count
        return moment if self._scale is None else moment / self._scale.outer(self._scale)

    @property
    def hessian(self) -> Tensor:
        """[in, in] float32: 2 E[x x^T], the Hessian of the squared error of one output."""
        return (2 * self.second_moment).float()

    @property
    def raw(self) -> Tensor:
        """[N, in]: an evenly spaced sample of at most about 4096 tokens."""
        if not self._raw:
            raise AttributeError("tokens were not kept: declare needs = {'raw'}")
        return self._divide(torch.cat(self._raw))

    def _divide(self, values: Tensor) -> Tensor:
        return values if self._scale is None else values / self._scale

    def _require(self, value: Tensor | None, need: str) -> Tensor:
        if value is None:
            raise AttributeError(f"not gathered: declare needs = {{{need!r}}}")
        return value


def view_layer(name: str, module: nn.Module, inputs: Inputs, seed: int, prepared: Any = None) -> Layer:
    """A linear, replaced or not, as methods see it. Raises `Refused` where its weights are not finite."""
    weight = dense_weight(module).detach().clone()
    if not torch.isfinite(weight).all():
        raise Refused(f"{name}: the weights hold NaN or infinity")
    return Layer(name, module, inputs, seed, weight, dense_bias(module), kept(module), prepared)


class _Reached(Exception):
    """Raised to end a forward pass early, once its hook has what it needs."""


def _first(out: Any) -> Tensor:
    """The hidden states among the outputs of a module."""
    states: Tensor = out if isinstance(out, Tensor) else out[0]
    return states


class BlockInputs:
    """One transformer block with the calibration set's hidden states at its input."""

    def __init__(
        self,
        run: Run,
        index: int,
        hidden: list[Tensor],
        calls: list[dict[str, Any]],
        gradients: dict[str, dict[str, Tensor]] | None = None,
        prepared: Any = None,
    ) -> None:
        self.run = run
        self.index = index
        self.view = Blocks(run.model)
        self.module: nn.Module = self.view.blocks[index]
        self.hidden = hidden  # one [1, T, H] per sequence
        self.outputs = hidden  # what the next block is to receive
        self._calls = calls  # keyword arguments of the block, per sequence
        self._inputs: dict[str, Inputs] = {}
        self._taken: dict[str, Tensor] = {}  # scales [in] that go into a linear's weights, by its path in the block
        self._given: dict[str, Tensor] = {}  # and those [out] that its outputs are divided by
        self._gradients = gradients or {}
        self._prepared = prepared

    def forward(self) -> list[Tensor]:
        """Outputs of the block as it is now, one per sequence."""
        with torch.no_grad():
            return [self._one(hidden, call) for hidden, call in zip(self.hidden, self._calls, strict=True)]

    def _one(self, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        return _first(self.module(hidden, *call["args"], **call["kwargs"]))

    def replay(self, module: nn.Module) -> Callable[[], list[Tensor]]:
        """A function that runs a submodule on what it is now given on every sequence; the submodule may change."""
        inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((args, kwargs))
            raise _Reached

        handle = module.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for hidden, call in zip(self.hidden, self._calls, strict=True):
                with contextlib.suppress(_Reached), torch.no_grad():
                    self._one(hidden, call)
        finally:
            handle.remove()

        def outputs() -> list[Tensor]:
            with torch.no_grad():
                return [_first(module(*args, **kwargs)) for args, kwargs in inputs]

        return outputs

    def gather(self, shared: Sequence[SharedInput], needs: Set[str]) -> None:
        """Run the block once, gather the statistics of every shared input, keep the block's outputs."""
        total = sum(hidden.shape[1] for hidden in self.hidden)
        with contextlib.ExitStack() as stack:
            for group in shared:
                first = self.module.get_submodule(group.names[0])
                inputs = Inputs(needs, total)
                for name in group.names:
                    self._inputs[name] = inputs
                stack.callback(first.register_forward_pre_hook(self._taker(inputs)).remove)
            self.outputs = self.forward()
        if not all(torch.isfinite(hidden).all() for hidden in self.outputs):
            raise Diverged(f"{self.view.path(self.index, '')[:-1]}: activations are not finite during calibration")

    @staticmethod
    def _taker(inputs: Inputs) -> Any:
        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.add(args[0].detach().flatten(0, -2))

        return take

    def fold(self, shared: Sequence[SharedInput], scales: Sequence[Tensor | None]) -> None:
        """Divide shared inputs by scales [in] that the linears behind them take up: the block computes what it did.

        What comes before is changed in place, unless it is among the linears of `shared`: these show in `layers` and
        `dense_weight` what they take up and give away. Raises `Unsupported` where nothing before can absorb a scale or
        a linear behind it is skipped.
        """
        paths = {module: path for path, module in self.module.named_modules()}
        behind = {name for group in shared for name in group.names if self.run.targeted(self._path(name))}
        for group, scale in zip(shared, scales, strict=True):
            if scale is None:
                continue
            if group.previous is None or not behind.issuperset(group.names):
                raise Unsupported(f"{self._path(group.names[0])}: nothing can absorb a scale of its inputs")
            inputs = self._inputs[group.names[0]].divided(scale)
            for name in group.names:
                self._inputs[name], self._taken[name] = inputs, scale
            previous = paths[group.previous]
            if previous in behind:
                self._given[previous] = scale
            else:
                _divide_outputs(group.previous, scale)

    def dense_weight(self, path: str) -> Tensor:
        """The weights [out, in] of the linear at `path` in the model, with the scales folded into it."""
        name = path.removeprefix(self._path(""))
        weight = dense_weight(self.module.get_submodule(name))
        if name in self._taken:
            weight = weight * self._taken[name]
        return weight / self._given[name].unsqueeze(1) if name in self._given else weight

    def layers(self, shared: Sequence[SharedInput]) -> list[Layer]:
        """The linears named by `shared`, ready to be compressed."""
        return [self.layer(name) for group in shared for name in group.names if self.run.targeted(self._path(name))]

    def layer(self, name: str) -> Layer:
        """One linear by its path inside the block."""
        path = self._path(name)
        module = self.module.get_submodule(name)
        inputs = self._inputs.get(name) or Inputs(set(), 0)
        if self._gradients:
            inputs = copy.copy(inputs)  # statistics are shared, gradients belong to one linear
            for need, means in self._gradients.items():
                setattr(inputs, need, means[path])
        layer = view_layer(path, module, inputs, zlib.crc32(f"{self.run.seed}/{path}".encode()), self._prepared)
        if name in self._taken or name in self._given:
            layer.weight = self.dense_weight(path)
        if name in self._given and layer.bias is not None:
            layer.bias = layer.bias.detach() / self._given[name]
        return layer

    def statistics(self, path: str) -> Inputs | None:
        """What was gathered at the input of the linear at `path` in the model."""
        return self._inputs.get(path.removeprefix(self._path("")))

    def _path(self, name: str) -> str:
        return self.view.path(self.index, name)


def _divide_outputs(module: nn.Module, scale: Tensor) -> None:
    """Divide the outputs of a norm or a linear by `scale` [out], in place."""
    weight: nn.Parameter = module.weight  # type: ignore[assignment]
    bias: nn.Parameter | None = getattr(module, "bias", None)
    weight.data /= scale.view(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        bias.data /= scale


@torch.no_grad()
def walk(run: Run, needs: Set[str], prepared: Any = None) -> Iterator[BlockInputs]:
    """The blocks from first to last, each with the calibration set at its input; `outputs` go on to the next."""
    view = Blocks(run.model)
    gradients = mean_gradients(run, needs & GRADIENTS.keys())
    hidden: list[Tensor] = []
    calls: list[list[dict[str, Any]]] = [[] for _ in view.blocks]
    if needs - GRADIENTS.keys():
        hidden, calls = block_inputs(run, view)
    for index in range(len(view)):
        inputs = BlockInputs(run, index, hidden, calls[index], gradients, prepared)
        yield inputs
        run.progress("block", index + 1, len(view))
        hidden = inputs.outputs


@torch.no_grad()
def survey(run: Run, needs: Set[str]) -> Iterator[Layer]:
    """Every targeted linear with its statistics in the model as it stands; changes nothing."""
    for inputs in walk(run, needs):
        groups = inputs.view.shared_inputs(inputs.module)
        inputs.gather(groups, needs)
        yield from inputs.layers(groups)


def block_inputs(run: Run, view: Blocks) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """Hidden states at the first block, and the arguments that each block is called with, per sequence.

    Arguments are caught for every block: masks and positions may differ between layers.
    """
    hidden: list[Tensor] = []
    calls: list[list[dict[str, Any]]] = [[] for _ in view.blocks]

    def catcher(index: int) -> Any:
        def catch(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                hidden.append(states)
            calls[index].append({"args": args, "kwargs": kwargs})
            return states

        return catch

    originals = [block.forward for block in view.blocks]
    try:
        for index, block in enumerate(view.blocks):
            block.forward = catcher(index)
        for ids in run.calibration():
            # A live cache in the caught arguments would be filled at every replay and change the result.
            feed(run.model, {"input_ids": ids[None].to(run.device)}, body=True)  # the head is not needed
    finally:
        for block, original in zip(view.blocks, originals, strict=True):
            block.forward = original
    if not hidden:
        raise Unsupported("no calibration text")
    return hidden, calls


def mean_gradients(run: Run, needs: Set[str]) -> dict[str, dict[str, Tensor]]:
    """For each need, what `GRADIENTS` says of the gradient of the loss in every targeted linear's weight, [out, in]
    by path, averaged over the calibration sequences.

    Sequences are taken one by one: the square of each gradient is wanted, not the square of their mean. Raises
    `Unsupported` where a linear is packed.
    """
    if not needs:
        return {}
    linears = dense_linears(run)
    weights: dict[str, nn.Parameter] = {path: module.weight for path, module in linears.items()}  # type: ignore
    means = {
        need: {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in weights.items()}
        for need in needs
    }
    needed = {path: weight.requires_grad for path, weight in weights.items()}
    sequences = run.calibration()
    with torch.enable_grad():
        for weight in weights.values():
            weight.requires_grad_(True)
        for ids in sequences:
            ids = ids[None].to(run.device)
            loss = cross_entropy(feed(run.model, {"input_ids": ids}).logits, ids)
            for path, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                for need, total in means.items():
                    total[path] += GRADIENTS[need](gradient.float()) / len(sequences)
    for path, weight in weights.items():
        weight.requires_grad_(needed[path])
    for total in means.values():
        for path, module in linears.items():
            if isinstance(module, Conv1D):
                total[path] = total[path].T
    return means
