"""Experts on several ranks train what they train in one process."""

from __future__ import annotations

from typing import Any

import divided
import pytest
import torch
from divided import PROGRAM
from ranks import prepare
from same import check_overflowed, check_refused, check_resumed, check_trained, list_cases
from torch import nn

from effbench.core.recipe import parse
from effbench.methods.parallel.ep import EP
from effbench.nn.model.experts import list_experts


@pytest.mark.parametrize(("ranks", "name"), list_cases(PROGRAM, divided.EP), indirect=["ranks"])
def test_divided_experts_train_what_one_process_trains(ranks: list[dict[str, Any]], name: str) -> None:
    check_trained(PROGRAM, name, ranks)


def test_an_overflow_on_one_rank_is_skipped_by_all(ranks: list[dict[str, Any]]) -> None:
    check_overflowed("ep overflow", ranks)


@pytest.mark.parametrize("name", divided.EP_REFUSED)
def test_what_has_no_experts_to_divide_is_unsupported_on_all_ranks(name: str, two: list[dict[str, Any]]) -> None:
    check_refused(PROGRAM, [name], two)


def test_what_is_dispatched_and_combined_is_counted(ranks: list[dict[str, Any]]) -> None:
    """Two copies of a token go out, results come back, and gradients of both return."""
    counted = [rank["counted"]["ep"] for rank in ranks]
    blocks, width = 4, 128 * torch.float64.itemsize
    for rank in counted:
        assert rank["calls"]["all_to_all"] == blocks * (1 + 2 + 2)  # how many first
        rows = sum(max(sent, received) for sent, received in rank["rows"])
        assert rank["bytes"]["all_to_all"] == 2 * rows * width + blocks * 4 * torch.int64.itemsize
    for step in range(2 * blocks):  # in each block a dispatch and a combination
        sent, received = (sum(rank["rows"][step][way] for rank in counted) for way in (0, 1))
        assert sent == received <= 8 * 16 * 2  # each rank pads its rows to the longest of them
    for rank in counted:
        assert len({sent for sent, _ in rank["rows"][::2]}) == 1 and not rank["rows"][0][0] % (2 * 8 // len(ranks))


def test_each_rank_holds_its_experts_and_all_else(ranks: list[dict[str, Any]]) -> None:
    whole = prepare(divided.EP["ep"], 1).model
    experts = sum(p.nbytes for module in list_experts(whole) for p in module.parameters())
    rest = sum(p.nbytes for p in whole.parameters()) - experts
    for rank in ranks:
        cost = rank["counted"]["ep"]["cost"]
        assert cost["parameter_bytes"] == cost["gradient_bytes"] == rest + experts // len(ranks)


def test_killed_ranks_go_on_to_the_same_bits(two: list[dict[str, Any]]) -> None:
    check_resumed(PROGRAM, "ep", two)


def test_a_killed_rank_is_an_error_of_the_others_within_seconds(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[:-1]:
        error, seconds = rank["died"]
        assert error == "RuntimeError" and seconds < 5


def test_parts_and_whole_tensors_have_groups_of_their_own() -> None:
    """What takes many tensors in one call does not take both; here all are whole, and groups stay what they were."""
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    plain = torch.optim.AdamW([{"params": weights[:2], "lr": 0.1}, {"params": weights[2:], "lr": 0.2}])
    groups = EP().deal(plain).param_groups
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(2, 0.1), (1, 0.2)]


def test_recipes_say_how_many_ranks_they_take() -> None:
    assert parse("ep(ranks=4), fit()").ranks == 4
