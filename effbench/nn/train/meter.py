"""What a fit costs: one step is looked into, and a few are timed with the machine to themselves."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from effbench.core.errors import Unsupported
from effbench.core.run import FitCost
from effbench.machine import nvml
from effbench.nn.model.flops import count_flops
from effbench.nn.model.held import Followed, Made, count_bytes, identify
from effbench.nn.model.linear import Replaced, matrix_shape
from effbench.nn.train.batches import Batch
from effbench.nn.train.collectives import Collectives
from effbench.nn.train.slots import Parallel

if TYPE_CHECKING:
    from effbench.core.run import Run

FOLLOWED = 0  # place of the step whose tensors are followed: counting operations keeps some of them alive
LOOKED = 1  # place of the step that is looked into: the first one makes the optimizer's states
TIMED = range(2, 7)  # places of the steps that are timed; a fit of fewer is neither looked into nor timed


class Meter:
    """Takes the cost of a loop, step by step."""

    def __init__(self, run: Run, steps: int, parallel: Parallel) -> None:
        self._run = run
        self._looked = LOOKED if steps >= TIMED.stop or run.hollow else None
        self._timed = TIMED if steps >= TIMED.stop and not run.hollow else range(0)
        self._parallel = parallel
        self._looking = False
        self._milliseconds: list[float] = []
        self._saved = 0
        self._flops: int | None = None
        self._gradients: int | None = None  # bytes
        self._gathered = 0  # bytes
        self._collectives = Collectives()
        self._made = Made()
        self._peak = 0  # bytes
        self._tokens = 0  # that the step read which is looked into, in all of its passes
        self._length = 0  # of the longest row that it read, with padding
        self._alone = contextlib.ExitStack()
        self.earlier = {"seconds": 0.0, "joules": 0.0}  # spent before a checkpoint that the fit goes on from
        self._began = time.monotonic() - run.waited
        self._counter = nvml.energy_joules(run.device)
        self._joules = self._counter() if self._counter is not None else 0.0

    def take(self, place: int, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Take the step at a place, from 0, and its cost; gives what the step gives."""
        if place == self._looked:
            return self._look(step)
        if place == FOLLOWED and self._looked is not None:
            with self._made:
                return step()
        if place == self._timed.start and self._timed:
            self._alone.enter_context(self._run.alone())
        begin = time.perf_counter()
        line = step()
        if place in self._timed:
            if self._run.device.type == "cuda":
                torch.cuda.synchronize(self._run.device)
            self._milliseconds.append(1000 * (time.perf_counter() - begin))
        if place == self._timed.stop - 1:
            self._alone.close()
        return line

    def read(self, parts: Sequence[Batch]) -> None:
        """Take note of what a pass reads in this process: all tokens, prompts too, but no padding."""
        if self._looking:
            self._tokens += sum(int((batch["example"] >= 0).sum()) for batch in parts)
            self._length = max(self._length, *(batch["example"].shape[1] for batch in parts))

    @contextlib.contextmanager
    def forward(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Round a forward pass and its loss: the most that they have saved for the backward pass at a time, in the step
        that is looked into. Engines may go back for parts of a batch before they go forward with others."""
        if not self._looking:
            yield
        elif self._run.device.type == "cuda":
            before = torch.cuda.memory_allocated(self._run.device)
            yield
            self._saved = max(self._saved, torch.cuda.memory_allocated(self._run.device) - before)
        else:
            known = {identify(parameter) for parameter in parameters}
            saved = Followed()

            def keep(tensor: Tensor) -> Tensor:
                if identify(tensor) not in known:
                    saved.follow(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), self._see_gathered(known):
                yield
            self._saved = max(self._saved, saved.peak)

    def hold(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take note of what this process has made and held before the optimizer's step, and of its gradients."""
        self._peak = self._peak or self._made.peak  # of the step that is followed, and not of its optimizer
        if self._looking:
            self._gradients = count_bytes(p.grad for p in parameters if p.grad is not None)

    @contextlib.contextmanager
    def _see_gathered(self, known: set[int]) -> Iterator[None]:
        """Take note of weights that `fully_shard` gathers for a forward pass; while they are there they are `known`."""
        modules: list[Any] = [module for module in self._run.model.modules() if isinstance(module, FSDPModule)]
        ever = _count_whole(self._run.model)
        added: dict[nn.Module, set[int]] = {}

        def enter(module: nn.Module, *_: Any) -> None:
            whole = {identify(parameter) for parameter in module.parameters() if not isinstance(parameter, DTensor)}
            added[module] = whole - known
            known.update(whole)
            self._gathered = max(self._gathered, _count_whole(self._run.model) - ever)

        def leave(module: nn.Module, *_: Any) -> None:
            known.difference_update(added.pop(module))  # what is freed may be given to an activation

        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield

    def report(self, model: nn.Module, numbers: int, parameters: Sequence[nn.Parameter], optimizer: Any) -> FitCost:
        """The cost of all steps, of a model of so many parameters. What could not be measured is absent."""
        self._alone.close()
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        spent = self.spent()
        cost: FitCost = {
            "seconds": spent["seconds"],
            "parameters": numbers + count_packed(model),
            "parameter_bytes": count_bytes(model.parameters()),
            "buffer_bytes": count_bytes(model.buffers()),
            "gradient_bytes": count_bytes(parameters) if self._gradients is None else self._gradients,
            "optimizer_bytes": count_bytes(states),
        }
        if self._gathered:
            cost["gathered_bytes"] = self._gathered
        rule = self._predict(model, parameters, optimizer)
        if rule is not None:
            cost["rule_bytes"] = rule
        if self._collectives.calls:
            cost["collectives"] = {
                kind: {"calls": calls, "bytes": self._collectives.bytes[kind]}
                for kind, calls in sorted(self._collectives.calls.items())
            }
        if self._saved:
            cost["activation_bytes"] = self._saved
        if self._run.hollow:
            cost["fullest"] = sorted(self._parallel.fullest(optimizer))
        if self._length:
            cost["length"] = self._length
        if self._peak:
            cost["step_peak_bytes"] = self._peak
        if self._milliseconds:
            cost["step_ms"] = statistics.median(self._milliseconds)
            cost["timed_ms"] = self._milliseconds
        if self._looked is not None:
            flops = self._parallel.flops_per_token(math.nan if self._flops is None else self._flops, self._tokens)
            if math.isfinite(flops):
                cost["flops_per_token"] = flops
        if spent["joules"] > 0:
            cost["joules"] = spent["joules"]
        return cost

    def spent(self) -> dict[str, float]:
        """Seconds and joules of the fit so far; a counter of energy that stood still or went back says nothing."""
        joules = self._counter() - self._joules if self._counter is not None else 0.0
        told = joules > 0 and (self.earlier["joules"] > 0 or not self.earlier["seconds"])
        return {
            "seconds": self.earlier["seconds"] + time.monotonic() - self._run.waited - self._began,
            "joules": self.earlier["joules"] + joules if told else 0.0,
        }

    def _listen(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Take a step, and count what it tells other processes."""
        with self._collectives:
            return step()

    def _predict(self, model: nn.Module, parameters: Sequence[nn.Parameter], optimizer: Any) -> float | None:
        """Bytes of weights, gradients and AdamW's two states by the formula of the engine, in the types of this fit."""
        inner = getattr(optimizer, "optim", optimizer)
        if type(inner) is not torch.optim.AdamW:
            return None
        trained = sum(parameter.nbytes for parameter in parameters)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        shares = self._parallel.shares(model)
        return None if shares is None else shares.sum(weights, trained, 2 * trained)

    def _look(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        lines: list[dict[str, Any]] = []
        self._looking = True
        try:
            if self._run.hollow:
                return self._listen(step)
            self._flops = count_flops(lambda: lines.append(self._listen(step)))
        except Unsupported:
            if not lines:
                raise
            self._flops = None  # an op ran that nobody said how to count
        finally:
            self._looking = False
        return lines[0]


def count_packed(model: nn.Module) -> int:
    """Weights that lie in codes, which are no parameters."""
    packed = (module for module in model.modules() if isinstance(module, Replaced) and module.decodes)
    return sum(math.prod(matrix_shape(module)) for module in packed)


def _count_whole(model: nn.Module) -> int:
    """Bytes of parameters that lie here whole."""
    return count_bytes(p for p in model.parameters() if not isinstance(p, DTensor))
