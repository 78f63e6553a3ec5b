"""Activation checkpointing: blocks keep their inputs alone and are computed again for the backward pass."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    """Gradients are those of the plain fit, dropout included; each segment costs one more forward pass.

    With segments of k of n blocks, n / k inputs are kept and the activations of k blocks at a time: least at k = √n.
    """

    paper = "arXiv:1604.06174"
    published = "checkpointing(policy='sqrt'), fit()"
    type = "activation memory"
    weight_update = "training"
    claims = ("train.activations",)
    trials = ({}, {"policy": "sqrt"})

    policy: Literal["every", "sqrt"] = "every"  # segments of one block, or of as many as there are segments

    @contextlib.contextmanager
    def saving(self, run: Run) -> Iterator[None]:
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
