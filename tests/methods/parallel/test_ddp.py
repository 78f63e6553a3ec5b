"""Two ranks see what one sees, and train the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import train
from replicated import CASES, PROGRAM, SCALED
from same import check_resumed, check_trained, list_cases
from toys_training import fit

from effbench.checks import toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse, parse_step
from effbench.methods.parallel.ddp import DDP


@pytest.mark.parametrize(("ranks", "name"), list_cases(PROGRAM, CASES), indirect=["ranks"])
def test_ranks_train_what_one_trains(ranks: list[Any], name: str) -> None:
    check_trained(PROGRAM, name, ranks)


def test_ranks_are_bit_equal_also_where_they_drop_different_units(two: list[Any]) -> None:
    first, second = (rank["resumed"]["ddp"][0].parameters for rank in two)
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = toy_run("opt")
    assert not torch.equal(first["model.decoder.layers.0.fc1.weight"], moved.model.model.decoder.layers[0].fc1.weight)


def test_what_overflows_on_one_rank_is_skipped_on_all(two: list[Any]) -> None:
    first, second = (rank["trained"]["skipped"] for rank in two)
    assert first.report["skipped"] == second.report["skipped"] == CASES["skipped"].settings.steps
    assert all(torch.equal(first.parameters[name], second.parameters[name]) for name in first.parameters)


def test_scales_of_8_bit_floats_are_made_of_the_largest_numbers_of_all_ranks(two: list[Any]) -> None:
    alone = train(SCALED, 1).kept
    first, second = (rank["trained"]["scaled"].kept for rank in two)
    assert torch.equal(first["history"], second["history"]) and torch.equal(first["scale"], second["scale"])
    steps = SCALED.settings.steps
    of_first_step = steps - 1
    assert torch.allclose(first["history"][:, of_first_step], alone["history"][:, of_first_step], rtol=1e-6)
    assert (first["history"][:, :steps] > 0).all() and (first["scale"] != 1).all()


def test_killed_ranks_go_on_from_the_last_step_that_all_have_written(two: list[Any]) -> None:
    check_resumed(PROGRAM, "ddp", two)


def test_one_rank_is_no_rank() -> None:
    run, plain = toy_run(), toy_run()
    run.apply(DDP(ranks=1))
    fit(run), fit(plain)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True))


def test_ranks_that_are_not_there_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="2 ranks are wanted, and 1 are there"):
        toy_run().apply(DDP())


def test_recipes_say_how_many_ranks_they_take() -> None:
    assert parse("ddp(ranks=4), fit()").ranks == 4 and parse("fit()").ranks == parse("").ranks == 1
    with pytest.raises(Usage, match="ranks must be at least 1"):
        parse_step("ddp(ranks=0)")
