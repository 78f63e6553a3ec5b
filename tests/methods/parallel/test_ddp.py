"""Two ranks see what one sees, and train the same model."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import two_ranks
from toys_training import fit

from effbench.checks import toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse, parse_step
from effbench.methods.parallel.ddp import DDP


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two ranks has come to: parameters and reports by case, and parameters under dropout."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    arguments = (str(folder / "store"), str(folder))
    processes = [context.Process(target=two_ranks.work, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", two_ranks.CASES)
def test_two_ranks_train_what_one_trains(case: str, ranks: list[Any]) -> None:
    alone, report = two_ranks.train(case, 1)
    for results, *_ in ranks:
        parameters, told = results[case]
        assert max(float((parameters[name] - value).abs().max()) for name, value in alone.items()) < 1e-10
        for key in ("steps", "tokens", "distinct_tokens", "epochs"):
            assert told[key] == report[key]
        assert told["loss_last"] == pytest.approx(report["loss_last"], abs=1e-10)


def test_ranks_are_bit_equal_also_where_they_drop_different_units(ranks: list[Any]) -> None:
    (_, first, *_), (_, second, *_) = ranks
    assert all(torch.equal(first[name], second[name]) for name in first)
    moved = toy_run("opt")
    assert not torch.equal(first["model.decoder.layers.0.fc1.weight"], moved.model.model.decoder.layers[0].fc1.weight)


def test_what_overflows_on_one_rank_is_skipped_on_all(ranks: list[Any]) -> None:
    (first, told), (second, report) = (results["skipped"] for results, *_ in ranks)
    assert told["skipped"] == report["skipped"] == two_ranks.SETTINGS.steps
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scales_of_8_bit_floats_are_made_of_the_largest_numbers_of_all_ranks(ranks: list[Any]) -> None:
    alone, _ = two_ranks.scale(1)
    (first, _), (second, _) = (results["scaled"] for results, *_ in ranks)
    assert torch.equal(first["history"], second["history"]) and torch.equal(first["scale"], second["scale"])
    steps = two_ranks.SETTINGS.steps
    assert torch.allclose(
        first["history"][:, steps - 1], alone["history"][:, steps - 1], rtol=1e-6
    )  # of the first step
    assert (first["history"][:, :steps] > 0).all() and (first["scale"] != 1).all()


def test_killed_ranks_go_on_from_the_last_step_that_all_have_written(ranks: list[Any]) -> None:
    for _, whole, resumed, report in ranks:
        assert report["resumed"] == [2]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


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
