"""Stages train what one process trains, and what cannot be divided into stages ends in one line."""

from __future__ import annotations

from typing import Any

import divided
import pytest
import torch
from divided import PROGRAM
from ranks import prepare, train
from same import check_overflowed, check_refused, check_resumed, check_trained, list_cases
from torch import Tensor

from effbench.core.errors import Usage
from effbench.core.recipe import parse, parse_step
from effbench.nn.train.pipeline import cut


@pytest.mark.parametrize(("ranks", "name"), list_cases(PROGRAM, divided.PP), indirect=["ranks"])
def test_stages_train_what_one_process_trains(ranks: list[dict[str, Any]], name: str) -> None:
    check_trained(PROGRAM, name, ranks)


def test_gradients_are_clipped_and_steps_are_taken() -> None:
    """By descent along gradients as they are: a factor of them, or of their norm, shows in the weights."""
    case = divided.PP["pp"]._replace(changes={"steps": 1})
    first, last = prepare(case, 1).model.named_parameters(), train(case, 1).parameters
    moved = torch.stack([(last[name] - value.detach()).square().sum() for name, value in first]).sum().sqrt()
    assert case.settings.clip is not None
    assert float(moved) == pytest.approx(case.settings.clip * 0.5, rel=1e-5)  # norm times rate: clipping was active


def test_an_overflow_in_one_stage_is_skipped_by_all(ranks: list[dict[str, Any]]) -> None:
    check_overflowed("pp overflow", ranks)


@pytest.mark.parametrize("name", divided.PP_REFUSED)
def test_what_sees_more_than_a_stage_is_unsupported_on_all_ranks(name: str, two: list[dict[str, Any]]) -> None:
    check_refused(PROGRAM, [name], two)


def test_what_stages_send_is_counted(ranks: list[dict[str, Any]]) -> None:
    """Of 8 rows of 16 tokens, 3 micro-batches of 3 rows: states of width 128 forward, and their gradients back."""
    sent = 3 * 3 * 16 * 128 * torch.float64.itemsize
    for stage, rank in enumerate(ranks):
        neighbours = (stage > 0) + (stage < len(ranks) - 1)
        assert rank["counted"]["pp"]["calls"]["send"] == neighbours * (
            3 + 1
        )  # and that they know their shapes: 4 bytes
        assert rank["counted"]["pp"]["bytes"]["send"] == neighbours * (sent + 4)


def test_each_rank_holds_its_stage_and_what_is_tied_is_one_tensor_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    whole = prepare(divided.PP["pp"], 1).model
    table = whole.get_input_embeddings().weight.nbytes
    held = [rank["counted"]["pp"]["cost"] for rank in ranks]
    norm = whole.model.norm.weight.nbytes
    blocks = sum(p.nbytes for p in whole.model.layers.parameters()) // len(ranks)
    expected = [blocks] * len(ranks)
    expected[0] += table
    expected[-1] += table + norm
    assert [cost["parameter_bytes"] for cost in held] == expected
    assert [cost["gradient_bytes"] for cost in held] == expected
    assert sum(expected) - table == sum(p.nbytes for p in whole.parameters())


def test_going_back_early_saves_memory(two: list[dict[str, Any]]) -> None:
    """Of four micro-batches the first of two stages holds two at a time, and the last one one."""
    for told, most in zip(two, (2, 1), strict=True):
        gpipe, early = (told["costs"][f"pp({given})"]["activation_bytes"] for given in ("", "schedule='1f1b'"))
        assert gpipe * most / 4 <= early < gpipe * (most / 4 + 0.05)  # and what they share


def test_killed_stages_go_on_to_the_same_bits(two: list[dict[str, Any]]) -> None:
    check_resumed(PROGRAM, "pp", two)


def test_a_killed_stage_is_an_error_of_the_others_within_seconds(two: list[dict[str, Any]]) -> None:
    error, seconds = two[0]["died"]
    assert error == "RuntimeError" and seconds < 5


def test_micro_batches_hold_each_row_once_and_rows_without_labels_fill_up() -> None:
    batch = {
        "input_ids": torch.arange(14).view(7, 2),
        "labels": torch.arange(14).view(7, 2),
        "example": torch.arange(7)[:, None].expand(7, 2),
        "attention_mask": torch.ones(7, 1, 2, 2, dtype=torch.bool),
        "tally": torch.ones(7),
    }
    parts = cut(batch, 3, 1)
    assert [len(part["labels"]) for part in parts] == [3, 3, 3]
    labels: Tensor = torch.cat([part["labels"] for part in parts])
    assert torch.equal(labels[:7], batch["labels"]) and (labels[7:] == -100).all()
    assert (parts[-1]["example"][1:] == -1).all() and parts[0]["attention_mask"].shape == (3, 1, 2, 2)
    assert all(part["tally"] is batch["tally"] for part in parts)
    assert [len(part["labels"]) for part in cut(batch, 9, 1)] == [1] * 7
    assert [len(part["labels"]) for part in cut({"labels": labels[:1], "example": labels[:1]}, 2, 4)] == [1] * 4


def test_recipes_say_how_many_stages_they_take() -> None:
    assert parse("pp(ranks=4), fit()").ranks == 4
    for step, message in (("pp(microbatches=0)", "microbatches must be"), ("pp(schedule='zb')", "schedule")):
        with pytest.raises(Usage, match=message):
            parse_step(step)
