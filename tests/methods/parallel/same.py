"""What all engines are held to."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from ranks import SETTINGS, Program, train


def list_cases(program: Program, names: Collection[str]) -> list[Any]:
    """Numbers of ranks and names of cases, for parameters."""
    two = [pytest.param(2, name) for name in names]
    return two + [pytest.param(4, name, marks=pytest.mark.slow) for name in program.four if name in names]


def check_trained(program: Program, name: str, ranks: list[dict[str, Any]]) -> None:
    """Every rank's copy is the model that one process trains. By SGD without clipping a factor in the gradients would
    end elsewhere, and with it one in their norm."""
    case = program.cases[name]
    alone = train(case, 1)
    assert alone.moved > 1e-3
    bound = alone.moved / 100 if case.coarse else 1e-6 if case.single else 1e-10
    first = ranks[0]["trained"][name].parameters
    for rank in ranks:
        parameters, report, *_ = rank["trained"][name]
        assert parameters.keys() == alone.parameters.keys()
        assert max(float((parameters[key] - value).abs().max()) for key, value in alone.parameters.items()) < bound
        assert all(torch.equal(first[key], value) for key, value in parameters.items())
        for key in ("steps", "tokens", "distinct_tokens", "epochs", "groups"):
            assert report[key] == alone.report[key]
        assert report["loss_last"] == pytest.approx(alone.report["loss_last"], abs=(1 + 9 * case.coarse) * bound)
        assert report["cost"]["parameters"] == alone.report["cost"]["parameters"]
        assert report.get("skipped", 0) == len(case.overflows)


def check_resumed(program: Program, name: str, ranks: list[dict[str, Any]]) -> None:
    """Killed ranks have gone on from the last step that all have written, to the same bits."""
    for rank in ranks:
        whole, resumed = rank["resumed"][name]
        assert resumed.report["resumed"] == [program.killed[name].settings.steps - 2]
        assert all(torch.equal(whole.parameters[key], value) for key, value in resumed.parameters.items())


def check_refused(program: Program, names: Collection[str], ranks: list[dict[str, Any]]) -> None:
    """Cases are unsupported on all ranks, which say the same."""
    for name in names:
        (said,) = {rank["refused"][name] for rank in ranks}
        assert said.startswith("Unsupported: ") and program.refused[name][1] in said


def check_overflowed(name: str, ranks: list[dict[str, Any]]) -> None:
    """All ranks have skipped one pass of fp16: its scale was halved once, and doubled after two steps without."""
    first = ranks[0]["trained"][name].parameters
    for rank in ranks:
        parameters, report, _, kept = rank["trained"][name]
        assert report["skipped"] == 1 and report["steps"] == SETTINGS.steps
        assert kept == {"scale": 65536.0, "clean": 1}
        assert all(torch.equal(first[key], value) for key, value in parameters.items())
