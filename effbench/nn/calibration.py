"""Layer-by-layer calibration that streams: one block's activations at a time.

Held at any moment: the hidden states of the calibration set at one block's input, and that block's statistics.
Linears that share an input share its statistics. Padding never counts.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Diverged, Refused, Unsupported
from effbench.core.kinds import Weights
from effbench.core.packages import shorten
from effbench.nn.model.blocks import Blocks, Group
from effbench.nn.model.linear import MaskedLinear, dense_weight, kept

if TYPE_CHECKING:
    from effbench.core.method import Method
    from effbench.nn.run import ModelRun

RAW_TOKENS = 4096  # tokens kept verbatim for methods that need them
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {  # what is averaged over sequences, by need
    "grad": lambda gradient: gradient,
    "grad_abs": torch.abs,
    "grad2": torch.square,
}


class Inputs:
    """Statistics of what a linear receives during calibration; only what the method needs is gathered."""

    def __init__(self, needs: set[str], total: int) -> None:
        self.needs = needs
        self.count = 0  # tokens seen, padding excluded
        self._every = max(1, total // RAW_TOKENS)
        self._square: Tensor | None = None
        self._absolute: Tensor | None = None
        self._outer: Tensor | None = None
        self._raw: list[Tensor] = []
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

    @property
    def norm(self) -> Tensor:
        """[in]: L2 norm over all tokens."""
        return self._found(self._square, "norm").sqrt().float()

    @property
    def mean_abs(self) -> Tensor:
        """[in]: mean of |x| over all tokens."""
        return (self._found(self._absolute, "norm") / self.count).float()

    @property
    def second_moment(self) -> Tensor:
        """[in, in] float64: mean of x x^T over all tokens."""
        return self._found(self._outer, "hessian") / self.count

    @property
    def hessian(self) -> Tensor:
        """[in, in] float32: 2 E[x x^T], the Hessian of the squared error of one output."""
        return (2 * self.second_moment).float()

    @property
    def raw(self) -> Tensor:
        """[N, in]: an evenly spaced sample of at most about 4096 tokens."""
        if not self._raw:
            raise AttributeError("tokens were not kept: declare needs = {'raw'}")
        return torch.cat(self._raw)

    def _found(self, value: Tensor | None, need: str) -> Tensor:
        if value is None:
            raise AttributeError(f"not gathered: declare needs = {{{need!r}}}")
        return value


@dataclasses.dataclass
class Layer:
    """One linear as `Weights.compress` sees it."""

    name: str  # path in the model
    module: nn.Module  # what stands there now
    inputs: Inputs
    seed: int  # of this run and this layer
    prepared: Any = None  # what the method's `prepare` returned
    weight: Tensor = dataclasses.field(init=False)  # dense float32 [out, in], free to be changed
    bias: Tensor | None = dataclasses.field(init=False)
    kept: Tensor | None = dataclasses.field(init=False)  # bool [out, in]: False must stay zero

    def __post_init__(self) -> None:
        self.weight = dense_weight(self.module).detach().clone()
        self.bias = getattr(self.module, "bias", None)
        self.kept = kept(self.module)
        if not torch.isfinite(self.weight).all():
            raise Refused(f"{self.name}: the weights hold NaN or infinity")


class _Reached(Exception):
    """Ends a forward pass once what it was for is there."""


class BlockInputs:
    """One transformer block with the calibration set's hidden states at its input."""

    def __init__(
        self,
        run: ModelRun,
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
        self._gradients = gradients or {}
        self._prepared = prepared

    def forward(self) -> list[Tensor]:
        """Outputs of the block as it is now, one per sequence."""
        with torch.no_grad():
            return [self._one(hidden, call) for hidden, call in zip(self.hidden, self._calls, strict=True)]

    def _one(self, hidden: Tensor, call: dict[str, Any]) -> Tensor:
        out = self.module(hidden, *call["args"], **call["kwargs"])
        result: Tensor = out if isinstance(out, Tensor) else out[0]
        return result

    def output_of(self, module: nn.Module) -> list[Tensor]:
        """Outputs of a submodule on every sequence; the block runs no further than that."""
        found: list[Tensor] = []

        def keep(_: nn.Module, __: Any, out: Any) -> None:
            found.append(out if isinstance(out, Tensor) else out[0])
            raise _Reached

        handle = module.register_forward_hook(keep)
        try:
            for hidden, call in zip(self.hidden, self._calls, strict=True):
                with contextlib.suppress(_Reached), torch.no_grad():
                    self._one(hidden, call)
        finally:
            handle.remove()
        return found

    def gather(self, groups: Sequence[Group], needs: set[str]) -> None:
        """Run the block once, gather every group's input statistics, keep the block's outputs."""
        total = sum(hidden.shape[1] for hidden in self.hidden)
        with contextlib.ExitStack() as stack:
            for group in groups:
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

    def layers(self, groups: Sequence[Group]) -> list[Layer]:
        """The groups' linears, ready to be compressed."""
        return [self.layer(name) for group in groups for name in group.names if self.run.targeted(self._path(name))]

    def layer(self, name: str) -> Layer:
        """One linear by its path inside the block."""
        path = self._path(name)
        module = self.module.get_submodule(name)
        inputs = self._inputs.get(name) or Inputs(set(), 0)
        if self._gradients:
            inputs = copy.copy(inputs)  # statistics are shared, gradients belong to one linear
            for need, found in self._gradients.items():
                setattr(inputs, need, found[path])
        return Layer(path, module, inputs, zlib.crc32(f"{self.run.seed}/{path}".encode()), self._prepared)

    def _path(self, name: str) -> str:
        return self.view.path(self.index, name)


@torch.no_grad()
def walk(run: ModelRun, needs: set[str], prepared: Any = None) -> Iterator[BlockInputs]:
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
        hidden = inputs.outputs


@torch.no_grad()
def survey(run: ModelRun, needs: set[str]) -> Iterator[Layer]:
    """Every targeted linear with its statistics in the model as it stands; changes nothing."""
    for inputs in walk(run, needs):
        groups = inputs.view.groups(inputs.module)
        inputs.gather(groups, needs)
        yield from inputs.layers(groups)


@torch.no_grad()
def stream(run: ModelRun, method: Weights, prepared: Any = None) -> None:
    """Compress every targeted linear of every block with `method`, from the first block to the last."""
    needs: set[str] = set(method.needs)
    verb = "compress" if type(method).compress_block is Weights.compress_block else "compress_block"
    report = run.log.setdefault("layers", {})
    for inputs in walk(run, needs, prepared):
        groups = inputs.view.groups(inputs.module)
        for stage in [[group] for group in groups] if method.true_sequence else [groups]:
            inputs.gather(stage, needs)
            for path, module in method.compress_block(inputs, stage).items():
                check_module(module, method, verb)
                if not method.folds:
                    report[path] = _error(run.model.get_submodule(path), module, inputs, path)
                replace(run.model, path, module)
        if method.sequential:
            inputs.outputs = inputs.forward()


def _error(before: nn.Module, after: nn.Module, inputs: BlockInputs, path: str) -> dict[str, float]:
    """Relative error of the weights, and of the outputs where the inputs' second moment is known."""
    old = dense_weight(before)
    delta = dense_weight(after) - old
    found = {"weight_error": float(delta.norm() / old.norm().clamp(min=1e-30))}
    gathered = inputs._inputs.get(path.removeprefix(f"{inputs.view.path(inputs.index, '')}"))
    if gathered is not None and "hessian" in gathered.needs:
        moment = gathered.second_moment.float()
        full = ((old @ moment) * old).sum().clamp(min=1e-30)
        found["output_error"] = float(((delta @ moment) * delta).sum().div(full).clamp(min=0).sqrt())
    return found


def check_module(module: Any, method: Method, verb: str) -> None:
    """Raise `TypeError` unless what `verb` of a method returned is a module."""
    if not isinstance(module, nn.Module):
        code = getattr(type(method), verb).__code__
        returned = "None" if module is None else f"a {type(module).__name__}"
        where = f"{shorten(Path(code.co_filename))}:{code.co_firstlineno}"
        raise TypeError(f"{type(method).__name__}.{verb} returned {returned}; it must return a module ({where})")


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def block_inputs(run: ModelRun, view: Blocks) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
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
            body: Any = run.model.base_model  # the head is not needed
            body(input_ids=ids[None].to(run.device), use_cache=False)
    finally:
        for block, original in zip(view.blocks, originals, strict=True):
            block.forward = original
    if not hidden:
        raise Unsupported("no calibration text")
    return hidden, calls


def dense_linears(run: ModelRun) -> dict[str, nn.Module]:
    """The targeted linears by path. Raises `Unsupported` where one has no dense weights that could take a gradient."""
    linears = {path: module for path, module in Blocks(run.model).linears() if run.targeted(path)}
    for path, module in linears.items():
        if not isinstance(module, (nn.Linear, Conv1D, MaskedLinear)):
            raise Unsupported(f"{path}: gradients need dense weights; put this step first")
    return linears


def mean_gradients(run: ModelRun, needs: set[str]) -> dict[str, dict[str, Tensor]]:
    """For each need, what `GRADIENTS` says of the gradient of the loss in every targeted linear's weight, [out, in]
    by path, averaged over the calibration sequences.

    Sequences are taken one by one: the square of each gradient is wanted, not the square of their mean. Raises
    `Unsupported` where a linear is packed.
    """
    if not needs:
        return {}
    linears = dense_linears(run)
    weights: dict[str, nn.Parameter] = {path: module.weight for path, module in linears.items()}  # type: ignore
    found = {
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
            loss = run.model(input_ids=ids, labels=ids, use_cache=False).loss
            for path, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                for need, total in found.items():
                    total[path] += GRADIENTS[need](gradient.float()) / len(sequences)
    for path, weight in weights.items():
        weight.requires_grad_(needed[path])
    for total in found.values():
        for path, module in linears.items():
            if isinstance(module, Conv1D):
                total[path] = total[path].T
    return found
