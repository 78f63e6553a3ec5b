"""Activation checkpointing: what is computed again for the backward pass is not kept (Chen et al., 2016)."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.nn.model.blocks import Blocks
from effbench.nn.train.slots import Activations


class Keep(torch.autograd.Function):
    """Saves what passes through, so that it counts as an activation like all others; its gradient passes, too."""

    @staticmethod
    def forward(context: Any, hidden: Tensor) -> Tensor:
        context.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class Checkpointing(Train, Activations):
    """Gradients are those of the plain fit, dropout included.

    Segments of blocks keep their inputs alone and cost one more forward pass. Of n blocks in segments of k, n / k
    inputs are kept and the activations of k blocks at a time: least at k = √n. Selective (arXiv:2205.05198) keeps
    queries, keys and values, computes what attention makes of them again, and nothing else.
    """

    paper = "arXiv:1604.06174"
    published = "checkpointing(policy='sqrt'), fit()"
    caveats = ("attention that is fused keeps no scores and weights in the first place: selective saves little there",)
    type = "activation memory"
    weight_update = "training"
    claims = ("train.activations",)
    trials = ({}, {"policy": "sqrt"}, {"policy": "selective"}, {"policy": "none"})
    identity = {"policy": "none"}

    # Segments of one block, or of as many as there are segments; attention without its projections; or nothing.
    policy: Literal["none", "sqrt", "every", "selective"] = "every"

    def saving(self, run: Run) -> AbstractContextManager[None]:
        if self.policy == "none":
            return contextlib.nullcontext()
        return attending_again(run) if self.policy == "selective" else self._segments(run)

    @contextlib.contextmanager
    def _segments(self, run: Run) -> Iterator[None]:
        blocks = list(Blocks(run.model).blocks)
        size = 1 if self.policy == "every" else math.ceil(math.sqrt(len(blocks)))
        if size > 1:
            self._check_segments(run, blocks)
        with contextlib.ExitStack() as stack:
            for start in range(0, len(blocks), size):
                segment = blocks[start : start + size]
                forwards = [block.forward for block in segment]
                segment[0].forward = functools.partial(run_segment, forwards)
                for block in segment[1:]:
                    block.forward = pass_on
                for block in segment:
                    stack.callback(vars(block).pop, "forward")
            yield

    def _check_segments(self, run: Run, blocks: Sequence[nn.Module]) -> None:
        """Raise `Unsupported` where blocks of one segment are not given the same, or one of them is watched."""
        if len(set(getattr(run.model.config, "layer_types", None) or ())) > 1:
            raise Unsupported("policy='sqrt' needs blocks that all attend alike: give policy='every'")
        if getattr(run.model.config, "layerdrop", 0.0):
            raise Unsupported("policy='sqrt': training leaves out single blocks: give policy='every'")
        if any(block._forward_hooks for block in blocks):
            raise Unsupported("policy='sqrt': another method reads what single blocks give: give policy='every'")


def run_segment(forwards: Sequence[Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Blocks one after the other, of which nothing is kept but what they were given."""

    def compute(hidden: Tensor) -> Tensor:
        for forward in forwards:
            hidden = forward(hidden, *args, **kwargs)
        return hidden

    return checkpoint(compute, Keep.apply(hidden), use_reentrant=False)  # type: ignore[no-untyped-call]


def pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a block gives that the first of its segment has computed."""
    return hidden


@contextlib.contextmanager
def attending_again(run: Run) -> Iterator[None]:
    """Have the attention of the model's modules in training computed again; under the name that it goes by.

    Raises `Unsupported` for attention that is no function of transformers' table.
    """
    name = run.model.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get(name)
    if attend is None:
        raise Unsupported(f"policy='selective': attention {name!r} is not called by name: give policy='every'")
    mine = set(run.model.modules())

    def recompute(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module not in mine or not module.training or not torch.is_grad_enabled():
            return attend(module, query, key, value, *args, **kwargs)
        kept = (Keep.apply(part) for part in (query, key, value))  # type: ignore[no-untyped-call]
        return checkpoint(attend, module, *kept, *args, use_reentrant=False, **kwargs)

    AttentionInterface.register(name, recompute)
    try:
        yield
    finally:
        AttentionInterface.register(name, attend)
