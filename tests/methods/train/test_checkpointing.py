"""Checkpointing: the same gradients, fewer bytes, more operations."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from effbench.checks import TOYS, toy_run
from effbench.core.errors import Outcome
from effbench.core.recipe import parse
from effbench.core.run import FitReport
from effbench.nn.model.attention import own_attention
from effbench.nn.model.flops import count_flops
from effbench.nn.model.held import Made
from effbench.nn.run import ModelRun
from effbench.nn.train import meter

SHAPE: dict[str, Any] = {"num_hidden_layers": 9}


def trained(steps: str, architecture: str, **shape: Any) -> tuple[ModelRun, FitReport]:
    run = toy_run(architecture, shape=shape)
    for step in parse(steps).steps:
        run.apply(step)
    return run, fit(run, steps=3, batch_size=4)


@pytest.mark.parametrize("architecture", TOYS)
@pytest.mark.parametrize("policy", ["every", "sqrt", "selective"])
@pytest.mark.parametrize("before", ["", "prefix_tuning(length=4, hidden=16)", "lora(dropout=0.1)"])
def test_the_same_bits_with_dropout_and_what_other_methods_add(policy: str, before: str, architecture: str) -> None:
    # OPT draws between its blocks, too, so that segments of several blocks have their dropout from other draws.
    shape: dict[str, Any] = {}
    if (architecture, policy) == ("opt", "sqrt"):
        shape, before = {"dropout": 0.0}, before.replace("0.1", "0.0")
    if architecture == "mixtral":  # whose experts are no linears
        before = before.replace("dropout", "targets=('q_proj', 'v_proj'), dropout")
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
    peak = {policy: cost["step_peak_bytes"] - cost["gradient_bytes"] for policy, cost in costs.items()}
    assert peak["every"] < peak["sqrt"] < peak[""] / 2  # a block at a time, or three, beside what is kept
    for policy in ("every", "sqrt"):
        # The head is not computed again, nor what is only a block's output.
        assert 1.2 < costs[policy]["flops_per_token"] / costs[""]["flops_per_token"] < 4 / 3


def look(policy: str) -> tuple[int, int, int, Counter[str]]:
    """Of a pass through 32 blocks: bytes kept for the backward pass, at its peak, FLOPs, and calls by module."""
    run = toy_run(shape={"num_hidden_layers": 32, "hidden_size": 32, "intermediate_size": 64})
    ids = torch.arange(256).view(4, 64) % 95 + 1
    calls: Counter[str] = Counter()
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        for block in run.model.model.layers:
            block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def compute() -> Tensor:
        logits = run.model(ids, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())

    run.model.train()
    (method,) = parse(f"checkpointing(policy='{policy}')").steps
    with method.saving(run), Made() as live:  # type: ignore[attr-defined]
        loss = compute()
        kept = live.now
        loss.backward()
    calls.clear()
    with method.saving(run):  # type: ignore[attr-defined]
        flops = count_flops(lambda: compute().backward())
    return kept, live.peak, flops, calls


def test_bytes_and_operations_of_32_blocks() -> None:
    """Six blocks could not tell the root from every block."""
    costs = {policy: look(policy) for policy in ("none", "every", "sqrt", "selective")}
    block = costs["none"][0] / 32  # bytes of the activations of one, the unit of what follows
    kept = {policy: cost[0] / block for policy, cost in costs.items()}
    peak = {policy: cost[1] / block for policy, cost in costs.items()}
    flops = {policy: cost[2] / costs["none"][2] for policy, cost in costs.items()}
    inputs = 4 * 64 * 32 * 4 / block  # of one block
    assert peak["none"] == pytest.approx(32, rel=0.03)
    assert kept["every"] == pytest.approx(32 * inputs, abs=0.5)  # not O(1), as it is said now and then
    assert peak["every"] == pytest.approx(1 + 32 * inputs, abs=0.5)
    assert kept["sqrt"] == pytest.approx(6 * inputs, abs=0.5)
    assert peak["sqrt"] == pytest.approx(6 + 6 * inputs, abs=0.5) and peak["sqrt"] < 2 * math.sqrt(32)
    assert peak["every"] < peak["sqrt"] < peak["none"] / 4
    # One more forward pass is a third of a step; the last product of each segment need not be computed again.
    assert 1.25 < flops["every"] < flops["sqrt"] < 4 / 3
    # Attention alone, which in its fused form keeps next to nothing that could be saved.
    assert 1 < flops["selective"] < 1.2 and 0.95 < kept["selective"] / kept["none"] < 1


@pytest.mark.parametrize(
    ("policy", "again", "segments", "attention"),
    [("none", 0, 0, 0), ("every", 1, 32, 1), ("sqrt", 1, 6, 1), ("selective", 0, 0, 1)],
)
def test_each_part_is_computed_again_once_or_not_at_all(policy: str, again: int, segments: int, attention: int) -> None:
    attended: list[nn.Module] = []
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        attended.append(module)
        return plain(module, *args, **kwargs)

    AttentionInterface.register("sdpa", attend)
    try:
        *_, calls = look(policy)
    finally:
        AttentionInterface.register("sdpa", plain)
    last = calls.pop("mlp.down_proj")  # which the last block of a segment need not compute: nothing of it is kept
    assert last == 32 + again * (32 - segments)
    assert set(calls.values()) == {32 * (1 + again)} and len(calls) == 3
    assert len(attended) == 2 * 32 * (1 + attention)  # of two passes
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain


def test_selective_saves_the_weights_of_attention_that_is_watched() -> None:
    """Attention transfer reads them, so that attention is not fused."""
    found = {}
    for policy in ("none", "selective"):
        run = toy_run(shape={"num_hidden_layers": 4})
        kept: list[Tensor] = []
        run.infer.chain("attend_observe").append(lambda module, weights, kept=kept: kept.append(weights))
        (method,) = parse(f"checkpointing(policy='{policy}')").steps
        run.model.train()
        ids = torch.arange(256).view(2, 128) % 95 + 1
        with own_attention(run.model, run.infer), method.saving(run), Made() as live:  # type: ignore[attr-defined]
            loss = run.model(ids, use_cache=False).logits.sum()
            kept.clear()
            found[policy] = live.now
            loss.backward()
    assert found["selective"] < 0.8 * found["none"]


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
