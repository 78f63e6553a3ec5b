"""Checkpointing: the same gradients, fewer bytes, more operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toys_training import fit

from effbench.checks import TOYS, toy_run
from effbench.core.errors import Outcome
from effbench.core.recipe import parse
from effbench.core.run import FitReport
from effbench.nn.run import ModelRun
from effbench.nn.train import meter

SHAPE: dict[str, Any] = {"num_hidden_layers": 9}


def trained(steps: str, architecture: str, **shape: Any) -> tuple[ModelRun, FitReport]:
    run = toy_run(architecture, shape=shape)
    for step in parse(steps).steps:
        run.apply(step)
    return run, fit(run, steps=3, batch_size=4)


@pytest.mark.parametrize("architecture", TOYS)
@pytest.mark.parametrize("policy", ["every", "sqrt"])
@pytest.mark.parametrize("before", ["", "prefix_tuning(length=4, hidden=16)", "lora(dropout=0.1)"])
def test_the_same_bits_with_dropout_and_what_other_methods_add(policy: str, before: str, architecture: str) -> None:
    # OPT draws between its blocks, too, so that segments of several blocks have their dropout from other draws.
    shape: dict[str, Any] = {}
    if (architecture, policy) == ("opt", "sqrt"):
        shape, before = {"dropout": 0.0}, before.replace("0.1", "0.0")
    plain, _ = trained(before, architecture, **shape)
    steps = ", ".join(filter(None, [before, f"checkpointing(policy='{policy}')"]))
    run, _ = trained(steps, architecture, **shape)
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(run.model.get_parameter(name), parameter), name
    assert not any("forward" in vars(module) for module in run.model.modules())


def test_fewer_bytes_are_kept_for_one_more_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "TIMED", range(2, 3))  # a fit of three steps is looked into
    costs = {
        policy: trained(f"checkpointing(policy='{policy}')" if policy else "", "llama", **SHAPE)[1]["cost"]
        for policy in ("", "every", "sqrt")
    }
    assert costs["sqrt"]["activation_bytes"] < costs["every"]["activation_bytes"] < costs[""]["activation_bytes"] / 4
    for policy in ("every", "sqrt"):
        # The head is not computed again, nor what is only a block's output.
        assert 1.2 < costs[policy]["flops_per_token"] / costs[""]["flops_per_token"] < 4 / 3


@pytest.mark.parametrize(("blocks", "segments"), [(1, 1), (4, 2), (5, 2), (9, 3)])
def test_segments_are_as_many_as_they_have_blocks(blocks: int, segments: int) -> None:
    run = toy_run(shape={"num_hidden_layers": blocks})
    (method,) = parse("checkpointing(policy='sqrt')").steps
    with method.saving(run):  # type: ignore[attr-defined]
        heads = [block for block in run.model.model.layers if hasattr(block.forward, "args")]
        assert len(heads) == segments == math.ceil(blocks / math.ceil(math.sqrt(blocks)))
        assert sum(len(block.forward.args[0]) for block in heads) == blocks


def test_what_single_blocks_give_is_not_silently_another() -> None:
    run = toy_run(shape=SHAPE)
    run.model.model.layers[1].register_forward_hook(lambda *_: None)
    run.apply(parse("checkpointing(policy='sqrt')").steps[0])
    with pytest.raises(Outcome, match="reads what single blocks give"):
        fit(run)
