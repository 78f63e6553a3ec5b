"""Training in 8-bit floats: E4M3 forward, E5M2 for gradients, scales from past steps (Micikevicius et al., 2022)."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench import ops
from effbench.core.errors import Diverged, Unsupported
from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.kernels.fp8_quantize.reference import E4M3, E5M2
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.feed import count_soft
from effbench.nn.model.linear import MaskedLinear
from effbench.nn.train.batches import Batch
from effbench.nn.train.groups import widen
from effbench.nn.train.loss import count_tokens
from effbench.nn.train.slots import Parallel, Precision

DENSE = (nn.Linear, Conv1D, MaskedLinear)
MARGIN = math.floor(math.log2(torch.finfo(E4M3).max / torch.finfo(E4M3).smallest_normal))  # of numbers with all bits


@dataclass(frozen=True)
class FP8(Train):
    """The three products of every linear of the blocks take 8-bit floats and are summed in float32.

    Each input, weight and gradient of outputs has one scale, delayed: made of its largest magnitudes in the steps
    before, 1 in the first step. All ranks have the same. Padding does not count, nor do examples of which nothing is
    learned. Head, embeddings and what is no linear are float32.
    """

    paper = "arXiv:2209.05433"
    published = "fp8(), fit()"
    caveats = ("what is no linear is computed in float32, in the paper in 16 bits",)
    type = "training precision"
    weight_update = "training"
    claims = ("train.precision",)
    trials = ({}, {"margin": 1})

    history: int = 1024  # steps whose largest magnitudes count
    margin: int = 0  # powers of two that are left free above the largest magnitude, at most 14

    def check(self) -> None:
        self.require(self.history > 0, "history must be at least 1")
        self.require(
            0 <= self.margin <= MARGIN,
            f"margin must be in [0, {MARGIN}]: beyond it the largest magnitude, too, loses bits of E4M3",
        )

    def slot_values(self) -> dict[str, Any]:
        return {"precision": Delayed(self)}

    @contextlib.contextmanager
    def context(self, run: Run) -> Iterator[None]:
        tops = dict(Blocks(run.model).linears()).values()
        linears = [module for top in tops for module in top.modules() if type(module) in DENSE]
        if not linears:
            raise Unsupported("fp8 multiplies by dense weights, and every linear of the blocks is packed")
        delayed: Delayed = run.train.slot("precision")
        delayed.open(run, len(linears))
        capable = run.device.type == "cuda" and torch.cuda.get_device_capability(run.device) >= (8, 9)
        run.log.simulated |= not capable
        with widen(run.model.parameters()), contextlib.ExitStack() as stack:
            see = functools.partial(delayed.see, run)
            for module in (run.model, run.model.base_model):  # a method may ask for states alone
                stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
            for number, module in enumerate(linears):
                module.forward = functools.partial(delayed.apply, run, number, module, module.forward)
                stack.callback(vars(module).pop, "forward")
            yield


class Delayed(Precision):
    """Casts, and the scales of the steps to come. Numbered by linear: input, weight, gradient of outputs."""

    def __init__(self, method: FP8) -> None:
        self.method = method
        self.inside = False  # of a forward pass of the fit
        self.batch: Batch | None = None  # that is learned from in it
        self.counted: Tensor | None = None  # bool [B * T]: tokens of the pass that count; None: none do

    def open(self, run: Run, linears: int) -> None:
        """Begin with scales of 1 and an empty history."""
        on: dict[str, Any] = {"device": run.device}
        run.state(self.method).update(
            scale=torch.ones(3 * linears, **on),
            history=torch.zeros(3 * linears, self.method.history, **on),
            largest=torch.zeros(3 * linears, **on),  # magnitudes of the step that is being taken
            infinite=torch.zeros((), dtype=torch.int64, **on),  # numbers of it that are not finite
        )

    @contextlib.contextmanager
    def forward(self, run: Run, batch: Batch | None = None) -> Iterator[None]:
        state = run.state(self.method)
        state.update({name: tensor.to(run.device) for name, tensor in state.items()})  # a checkpoint was elsewhere
        self.inside, self.batch = True, batch
        try:
            yield
        finally:
            self.inside, self.batch, self.counted = False, None, None

    def see(self, run: Run, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Find which of the tokens count that the model is about to be given."""
        if self.batch is None or not torch.is_grad_enabled():
            self.counted = None
            return
        given: Tensor = args[0] if args else inputs["inputs_embeds" if inputs.get("input_ids") is None else "input_ids"]
        mask: Tensor | None = inputs.get("attention_mask")
        if run.train.slot("forward") is not None and (mask is None or mask.ndim == 2):
            # The rows are not those of the batch; a mask tells what is padding in them.
            real = torch.ones(given.shape[:2], device=run.device) if mask is None else mask
        else:
            real, front = count_tokens(self.batch), count_soft(run.model)
            more = given.shape[1] - front - real.shape[1]  # that an engine has filled up with
            real = torch.cat([real.any(1, True).expand(-1, front), real, real.new_zeros(len(real), more)], 1)
        self.counted = run.train.slot("parallel", Parallel()).own_tokens(real.bool()).flatten()

    def apply(self, run: Run, number: int, module: nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What a linear of the model computes in a pass of the fit, also where it is computed again for gradients: then
        nothing counts, as it has before."""
        if not (self.inside or module.training):
            return plain(x)
        weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
        matrix = weight.T if isinstance(module, Conv1D) else weight
        quantize = functools.partial(self.quantize, run.state(self.method), self.counted)
        y: Tensor = Product.apply(x, matrix, quantize, 3 * number).to(x.dtype)  # type: ignore[no-untyped-call]
        return y if bias is None else y + bias

    def quantize(self, state: dict[str, Any], counted: Tensor | None, place: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The bits of a tensor and its scale; the largest magnitude is noted of a weight, or of the tokens that count
        of a pass. Where a tensor has other rows than tokens, all of them do."""
        scale = state["scale"][place].clone()
        rows = None if counted is None or place % 3 == 1 or len(x) != len(counted) else counted
        codes, largest, infinite = ops.load("fp8_quantize")(x, scale, place % 3 == 2, rows)
        if counted is not None:
            state["largest"][place] = torch.maximum(state["largest"][place], largest)
            state["infinite"] += infinite
        return codes, scale

    def unscale(self, parameters: Sequence[nn.Parameter], run: Run) -> bool:
        return not run.state(self.method)["infinite"]

    def settle(self, taken: bool, run: Run) -> None:
        if not taken:
            assert run.step is not None
            raise Diverged(f"numbers that were to be rounded to 8 bits are not finite at step {run.step.index + 1}")
        state, parallel = run.state(self.method), run.train.slot("parallel", Parallel())
        state["history"] = state["history"].roll(1, 1)
        state["history"][:, 0] = parallel.largest(state["largest"])
        state["scale"] = next_scale(state["history"].amax(1), state["scale"], self.method.margin)
        state["largest"] = torch.zeros_like(state["largest"])


def next_scale(largest: Tensor, scale: Tensor, margin: int) -> Tensor:
    """The scales [3 L] that come after `scale`, of largest magnitudes [3 L] of the history.

    The largest becomes what the format can hold at most, over 2^margin. A scale stays where that is no number.
    """
    tops = torch.tensor([torch.finfo(kind).max for kind in (E4M3, E4M3, E5M2)], device=scale.device)
    new = tops.repeat(len(scale) // 3) / largest / 2.0**margin
    new = new.clamp(max=torch.finfo(torch.float32).max)
    return torch.where(largest.isfinite() & (largest > 0), new, scale)


class Product(torch.autograd.Function):
    """y = x W^T and its gradients, each product of 8-bit numbers; what is kept for the backward pass are their bits."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, quantize: Any, place: int) -> Tensor:
        inputs, of_inputs = quantize(place, x.flatten(0, -2))
        weights, of_weights = quantize(place + 1, weight.contiguous())
        context.save_for_backward(inputs, weights, of_inputs, of_weights)
        context.quantize, context.place = quantize, place
        y: Tensor = ops.load("fp8_product")(inputs, weights, of_inputs, of_weights)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weights, of_inputs, of_weights = context.saved_tensors
        multiply = functools.partial(ops.load("fp8_product"), gradients=True)
        codes, scale = context.quantize(context.place + 2, gradient.flatten(0, -2).contiguous())
        for_inputs = for_weights = None
        if context.needs_input_grad[0]:
            for_inputs = multiply(codes, weights.T.contiguous(), scale, of_weights).view(*gradient.shape[:-1], -1)
        if context.needs_input_grad[1]:
            for_weights = multiply(codes.T.contiguous(), inputs.T.contiguous(), scale, of_inputs)
        return for_inputs, for_weights, None, None
