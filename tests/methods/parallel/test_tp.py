"""Heads and units of several ranks compute what those of one compute."""

from __future__ import annotations

from typing import Any

import pytest
import sharded
import torch
from ranks import Case, prepare, take_steps, train
from same import check_refused, check_trained, list_cases
from sharded import PROGRAM

from effbench.checks import VOCABULARY, WIDTH, toy, toy_run
from effbench.core.errors import Unsupported
from effbench.core.recipe import parse_step
from effbench.methods.parallel._megatron import check_heads, check_linears
from effbench.methods.parallel.tp import TP
from effbench.nn.model.blocks import Blocks


@pytest.mark.parametrize(("ranks", "name"), list_cases(PROGRAM, sharded.TP), indirect=["ranks"])
def test_ranks_train_what_one_trains(ranks: list[Any], name: str) -> None:
    check_trained(PROGRAM, name, ranks)


def test_ranks_hold_their_part_of_matrices_and_all_norms(two: list[Any]) -> None:
    model = toy_run().model
    matrices = sum(parameter.nbytes for parameter in model.parameters() if parameter.ndim == 2)
    vectors = sum(parameter.nbytes for parameter in model.parameters() if parameter.ndim == 1)
    for told in two:
        for engine in ("tp()", "sp()"):
            cost = told["costs"][engine]
            assert cost["parameter_bytes"] == cost["gradient_bytes"] == matrices // 2 + vectors
            assert cost["rule_bytes"] == 4 * cost["parameter_bytes"]  # with the gradients and two states


def test_operations_are_those_of_all_ranks_over_tokens_that_count_once(two: list[Any]) -> None:
    """One rank's would be half of them; rows that are filled up, and products by the table, cost a few percent."""
    flops = {
        engine: cost["flops_per_token"] / two[0]["costs"]["ddp()"]["flops_per_token"]
        for engine, cost in two[0]["costs"].items()
    }
    assert all(ratio == pytest.approx(1) for engine, ratio in flops.items() if engine.startswith("fsdp"))
    assert all(0.999 < ratio < 1.2 for ratio in flops.values()), flops


def test_blocks_cost_two_reductions_each_way(two: list[Any]) -> None:
    """Section 3 of the paper: of [B, T, H] for attention and MLP of two blocks, forward and backward; further one for
    the rows of the table, one for what the head gives back, and one number for the norm of gradients."""
    told = two[0]["costs"]["tp()"]["collectives"]
    tokens = told["all_gather"]["bytes"] / (4 * VOCABULARY)  # whose logits are put together
    assert told["all_reduce"]["calls"] == 2 * 4 + 3
    assert told["all_reduce"]["bytes"] == 10 * 4 * tokens * WIDTH + 8


def test_what_cannot_be_divided_is_unsupported(two: list[Any]) -> None:
    check_refused(PROGRAM, sharded.TP_REFUSED, two)
    with pytest.raises(Unsupported, match="Conv1D"):
        check_linears(toy_run("gpt2"), 2)
    for what in (lambda run: check_linears(run, 2), lambda run: TP().shares(run.model)):
        with pytest.raises(Unsupported, match="experts hold their weights in one tensor"):
            what(toy_run("mixtral"))
    with pytest.raises(Unsupported, match="4 ranks are more than 2 heads of keys"):
        check_heads(Blocks(toy("qwen2")), 4)
    with pytest.raises(Unsupported, match="4 heads cannot be dealt out evenly to 3 ranks"):
        check_heads(Blocks(toy()), 3)


def test_one_rank_is_no_rank() -> None:
    engines = ("tp(ranks=1)", "sp(ranks=1)", "sp(ranks=1, kind='ulysses')", "fsdp(ranks=1)", "pp(ranks=1)")
    for plain, steps in ((Case(""), engines), (Case("", "mixtral"), ("ep(ranks=1)",))):
        alone = train(plain, 1).parameters
        for engine in steps:
            run = prepare(plain, 1)
            run.apply(parse_step(engine))
            assert all(torch.equal(value, alone[name]) for name, value in take_steps(run, plain).parameters.items())
