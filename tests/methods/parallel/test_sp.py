"""Tokens divided over ranks train what one rank trains."""

from __future__ import annotations

from typing import Any

import pytest
import sharded
import torch
from ranks import train
from same import check_refused, check_trained, list_cases
from sharded import PROGRAM

from effbench.checks import toy_run


@pytest.mark.parametrize(("ranks", "name"), list_cases(PROGRAM, sharded.SP), indirect=["ranks"])
def test_ranks_train_what_one_trains(ranks: list[Any], name: str) -> None:
    check_trained(PROGRAM, name, ranks)


def test_scales_of_8_bit_floats_are_those_of_whole_rows(two: list[Any]) -> None:
    """Each rank knows which of its own tokens are padding."""
    case = PROGRAM.cases["ulysses-fp8"]
    alone = train(case, 1).kept["history"][:, case.settings.steps - 1]
    for rank in two:
        first = rank["trained"]["ulysses-fp8"].kept["history"][:, case.settings.steps - 1]
        assert torch.allclose(first, alone, rtol=1e-6, atol=0)


def test_megatron_gathers_and_scatters_where_tp_reduces(two: list[Any]) -> None:
    """Figure 6 of arXiv:2205.05198: one of each for attention and MLP each way; and the stream at both ends."""
    found = two[0]["costs"]["sp()"]["collectives"]
    blocks = 2 * 4  # two blocks, attention and MLP, forward and backward
    assert found["reduce_scatter"]["calls"] == blocks
    assert found["all_gather"]["calls"] == blocks + 3  # at the end, backward at the beginning, and of logits
    assert found["all_gather"]["bytes"] > found["reduce_scatter"]["bytes"]


def test_ulysses_exchanges_heads_for_tokens(two: list[Any]) -> None:
    """Section 3.1 of arXiv:2309.14509: of queries, keys, values and outputs, each way; and whole weights stay."""
    cost = two[0]["costs"]["sp(kind='ulysses')"]
    assert cost["collectives"]["all_to_all"]["calls"] == 2 * 4 * 2
    whole = sum(parameter.nbytes for parameter in toy_run().model.parameters())
    assert cost["parameter_bytes"] == whole and cost["rule_bytes"] == 4 * whole


def test_activations_are_divided(two: list[Any]) -> None:
    costs = two[0]["costs"]
    whole = costs["ddp()"]["activation_bytes"] * 2  # of which a rank sees half the examples
    assert costs["sp()"]["activation_bytes"] < costs["tp()"]["activation_bytes"] < whole


def test_what_needs_all_tokens_is_unsupported(two: list[Any]) -> None:
    check_refused(PROGRAM, sharded.SP_REFUSED, two)
