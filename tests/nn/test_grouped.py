"""Shared heads of keys and values: the class that attention becomes computes as the one that it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys_cache import run_of
from toys_grouped import NO_FIELD, SIZE, change_heads, make, mean, repeat
from toys_structured import zero_inputs

from effbench.checks import IDS, probe
from effbench.core.errors import Unsupported
from effbench.core.recipe import parse_step
from effbench.methods.attention.gqa import GQA
from effbench.methods.parallel._megatron import check_heads
from effbench.nn.model.attention import list_attention
from effbench.nn.model.blocks import Blocks, count_heads, project_keys
from effbench.nn.model.grouped import GROUPED, regroup
from effbench.nn.model.structure import heads
from effbench.nn.train.example_gradients import find_gradients, find_matrices

DROPOUT = {"opt": "attention_dropout", "gpt2": "attn_pdrop", "gpt_neox": "attention_dropout"}


@pytest.mark.parametrize("architecture", NO_FIELD)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_with_all_heads_left_it_computes_what_the_original_does(architecture: str, kernel: str) -> None:
    """In training, too: the same weights of attention are dropped."""
    before, after = (make(architecture, 4, **{DROPOUT[architecture]: 0.4}).model for _ in range(2))
    view = Blocks(after)
    for index in range(len(view)):
        regroup(view, index, lambda rows: rows)
    assert {type(module) for module in list_attention(after)} <= {*GROUPED.values()}
    for model in (before, after):
        model.set_attn_implementation(kernel)
    for training in (False, True):
        outs = []
        for model in (before, after):
            torch.manual_seed(3)
            outs.append(model.train(training)(IDS).logits)
        torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=0)
    assert not torch.allclose(outs[0], before.eval()(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("architecture", NO_FIELD)
def test_gradients_arrive_in_what_is_shared(architecture: str) -> None:
    """Those of a shared head are the sums of those of the heads that it stands for."""
    shared, plain = make(architecture, 4), make(architecture, 4)
    change_heads(plain.model, repeat(2, mean))
    shared.apply(GQA(kv_heads=2))
    found = []
    for run in (shared, plain):
        batch = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}
        (part,) = find_matrices(run, 1, ("v",))
        found.append(find_gradients(run.model, [part], batch)[1].view(2, -1, SIZE, 4 * SIZE))
        width = len(part.rows) if part.rows is not None else part.module.out_features
        assert width == SIZE * (2 if run is shared else 4)
    torch.testing.assert_close(found[0], found[1].unflatten(1, (2, 2)).sum(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", NO_FIELD)
def test_keys_and_values_of_states_are_found(architecture: str) -> None:
    run = make(architecture, 8)
    run.apply(GQA(kv_heads=2))
    for attention in list_attention(run.model):
        assert count_heads(attention) == (2, SIZE)
        hidden = torch.randn(5, 8 * SIZE)
        _, *expected = attention.project(hidden)  # [T, H, D]
        for found, states in zip(project_keys(attention, hidden), expected, strict=True):
            torch.testing.assert_close(found, states.transpose(0, 1))


@pytest.mark.parametrize("architecture", ["llama", *NO_FIELD])
def test_a_group_without_effect_can_be_pruned(architecture: str) -> None:
    run = make(architecture, 8)
    run.apply(GQA(kv_heads=4))
    view = Blocks(run.model)
    zero_inputs(view.blocks[1].get_submodule(view.names.out), torch.arange(2 * SIZE, 4 * SIZE))  # group 1
    before = probe(run)
    run.apply(parse_step("head_pruning(sparsity=0.125)"))
    assert [(heads(view, i).queries, heads(view, i).groups) for i in (0, 1)] == [(8, 4), (6, 3)]
    torch.testing.assert_close(probe(run), before, atol=1e-5, rtol=0)
    run.apply(GQA(kv_heads=1))
    assert [heads(view, i).share for i in (0, 1)] == [8, 6] and torch.isfinite(probe(run)).all()


@pytest.mark.parametrize("steps", ["prefix_tuning(length=3)", "llama_adapter(layers=1)", "lora()", "awq()", "rtn()"])
@pytest.mark.parametrize("architecture", NO_FIELD)
def test_other_steps_work_behind_it(architecture: str, steps: str) -> None:
    run = make(architecture, 8)
    run.apply(GQA(kv_heads=2))
    run.apply(parse_step(steps))
    assert torch.isfinite(probe(run)).all()


@pytest.mark.parametrize("architecture", ["llama", *NO_FIELD])
def test_heads_behind_a_prefix_stay(architecture: str) -> None:
    run = run_of("prefix_tuning(length=3)", architecture)
    for step in ("head_pruning(sparsity=0.25)", "gqa()"):
        with pytest.raises(Unsupported, match="holds keys and values of the heads there are"):
            run.apply(parse_step(step))


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_rescaling_of_fused_keys_takes_as_many_queries(architecture: str) -> None:
    with pytest.raises(Unsupported, match="heads share them"):
        run_of("gqa(), ia3()", architecture)
    assert torch.isfinite(probe(run_of("gqa(), ia3()", "opt"))).all()


def test_ranks_are_dealt_the_heads_that_there_are() -> None:
    run: Any = make("gpt_neox", 8)
    check_heads(Blocks(run.model), 8)
    run.apply(GQA(kv_heads=4))
    check_heads(Blocks(run.model), 4)
    with pytest.raises(Unsupported, match="8 ranks are more than 4 heads of keys"):
        check_heads(Blocks(run.model), 8)


def test_attention_to_an_encoder_is_left_alone() -> None:
    run = run_of("", "gpt2", add_cross_attention=True)
    with pytest.raises(Unsupported, match="attend to an encoder"):
        run.apply(GQA(kv_heads=2))
