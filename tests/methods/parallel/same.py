"""What all engines are held to."""

from __future__ import annotations

from typing import Any

import engines
import pytest
import torch


def check(name: str, ranks: list[dict[str, Any]]) -> None:
    """Every rank's copy is the model that one rank trains by SGD: without clipping a factor in the gradients would end
    elsewhere, and with it one in their norm."""
    case = engines.CASES[name]
    start = engines.read(engines.prepare(case, 1))
    alone, report = engines.train(case, 1)
    moved = max(float((alone[key] - value).abs().max()) for key, value in start.items())
    bound = moved / 100 if case.coarse else 1e-6 if case.single else 1e-10
    assert moved > 1e-3
    for told in ranks:
        parameters, found = told["cases"][name]
        assert parameters.keys() == alone.keys()
        assert max(float((parameters[key] - value).abs().max()) for key, value in alone.items()) < bound
        for key in ("steps", "tokens", "distinct_tokens", "epochs", "groups"):
            assert found[key] == report[key]
        assert found["loss_last"] == pytest.approx(report["loss_last"], abs=10 * bound)
        assert found.get("skipped", 0) == ("overflow" in name)
        assert all(torch.equal(parameters[key], value) for key, value in ranks[0]["cases"][name][0].items())
