"""States, gradients and weights in parts train what one rank trains."""

from __future__ import annotations

from typing import Any

import pytest
import sharded
import torch
from same import check_refused, check_resumed, check_trained, list_cases
from sharded import PROGRAM

from effbench.checks import toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse, parse_step
from effbench.methods.parallel.fsdp import FSDP


@pytest.mark.parametrize(("ranks", "name"), list_cases(PROGRAM, sharded.FSDP), indirect=["ranks"])
def test_ranks_train_what_one_trains(ranks: list[Any], name: str) -> None:
    check_trained(PROGRAM, name, ranks)


def test_norm_counts_what_is_replicated_once(ranks: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(4)]
    norm = float(torch.linalg.vector_norm(torch.stack(whole)))
    for told in ranks:
        found, clipped = told["mixed"]
        assert found == pytest.approx(norm, rel=1e-14)
        for gradient, plain in zip(clipped, whole, strict=True):
            torch.testing.assert_close(gradient, plain / (norm + 1e-6), rtol=1e-14, atol=0)


@pytest.mark.parametrize("engine", PROGRAM.killed)
def test_killed_ranks_go_on_to_the_same_bits(engine: str, two: list[Any]) -> None:
    check_resumed(PROGRAM, engine, two)


def test_bytes_are_those_of_the_formula(two: list[Any]) -> None:
    """In float32, per parameter and rank of two: 16, 12, 10 and 8 bytes; `fully_shard` divides every tensor evenly."""
    numbers = sum(parameter.numel() for parameter in toy_run().model.parameters())
    tensors = len(list(toy_run().model.parameters()))
    for told in two:
        costs = told["costs"]
        for engine, each in (("ddp()", 16), ("fsdp(stage=1)", 12), ("fsdp(stage=2)", 10), ("fsdp()", 8)):
            assert costs[engine]["rule_bytes"] == each * numbers
        whole = {"parameter_bytes": 4 * numbers, "gradient_bytes": 4 * numbers}
        assert {name: costs["ddp()"][name] for name in whole} == whole
        assert costs["ddp()"]["optimizer_bytes"] == 8 * numbers + 4 * tensors  # and the steps that each has taken
        assert {name: costs["fsdp(stage=1)"][name] for name in whole} == whole
        for engine in ("fsdp(stage=2)", "fsdp()"):  # between steps both hold parts
            cost = costs[engine]
            assert cost["parameter_bytes"] == cost["gradient_bytes"] == 2 * numbers
            assert cost["optimizer_bytes"] == 4 * numbers + 4 * tensors
        assert costs["fsdp(stage=2)"]["gathered_bytes"] == 4 * numbers
        assert costs["fsdp()"]["gathered_bytes"] < 4 * numbers
        for engine in ("fsdp(stage=1)", "fsdp(stage=2)", "fsdp()"):  # what is gathered is no activation
            assert costs[engine]["activation_bytes"] == costs["ddp()"]["activation_bytes"]
    dealt = [told["costs"]["fsdp(stage=1)"]["optimizer_bytes"] for told in two]
    assert sum(dealt) == 8 * numbers + 4 * tensors and max(dealt) < 1.1 * sum(dealt) / 2


@pytest.mark.parametrize("ranks", [2, 64])
def test_formula_is_that_of_16_bit_training(ranks: int) -> None:
    """Weights and gradients of 2 bytes, 12 of states (figure 1 of the paper): d + 12 d / N would be of no stage."""
    found = [FSDP(ranks=ranks, stage=stage).shares(toy_run().model).sum(2.0, 2.0, 12.0) for stage in (1, 2, 3)]
    assert found == [4 + 12 / ranks, 2 + 14 / ranks, 16 / ranks]
    if ranks == 64:  # of 7.5 billion parameters, in GB
        assert [round(7.5 * each, 1) for each in found] == [31.4, 16.6, 1.9]


def test_collectives_are_those_of_the_paper(two: list[Any]) -> None:
    """Psi parameters: a reduction of them, or (7.2) one gathering and one scattering, and at stage 3 a second one."""
    size = 4 * sum(parameter.numel() for parameter in toy_run().model.parameters())
    least = 200  # bytes of bookkeeping: counts of tokens and losses
    told = {engine: two[0]["costs"][engine]["collectives"] for engine in sharded.COST}

    def near(engine: str, kind: str, times: int) -> None:
        found = told[engine].get(kind, {"bytes": 0})["bytes"]
        assert times * size <= found <= times * size + least, (engine, kind)

    near("ddp()", "all_reduce", 1), near("fsdp(stage=1)", "all_reduce", 1), near("fsdp(stage=1)", "broadcast", 1)
    near("fsdp(stage=2)", "all_gather", 1), near("fsdp(stage=2)", "reduce_scatter", 1)
    near("fsdp()", "all_gather", 2), near("fsdp()", "reduce_scatter", 1)


def test_what_needs_whole_tensors_is_unsupported(two: list[Any]) -> None:
    check_refused(PROGRAM, sharded.FSDP_REFUSED, two)


def test_ranks_that_are_not_there_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="2 ranks are wanted, and 1 are there"):
        toy_run().apply(FSDP())


def test_settings_that_do_not_exist_are_wrong_usage() -> None:
    assert parse("fsdp(ranks=4), fit()").ranks == 4
    for wrong in ("fsdp(ranks=0)", "fsdp(stage=4)"):
        with pytest.raises(Usage):
            parse_step(wrong)
