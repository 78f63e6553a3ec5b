"""Taylor scores against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from effbench import checks
from effbench.methods.prune.taylor import Taylor
from effbench.nn.calibration import survey


@pytest.mark.parametrize("average", ["gradient", "magnitude"])
def test_taylor_scores_are_the_loss_changes_of_gates(average: Any) -> None:
    method = Taylor(average=average)
    run = checks.toy_run(sequences=3)
    layers = {layer.name: layer for layer in survey(run, set(method.needs))}
    path = "model.layers.1.mlp.up_proj"
    score = method.score(layers[path])
    model = run.model.double()
    weight = model.get_submodule(path).weight
    # Norms compute in float32, so only large scores stand out of the rounding.
    for place in score.flatten().topk(3).indices.tolist():
        row, column = divmod(place, score.shape[1])
        changes = []
        for ids in run.calibration():
            sides = []
            for gate in (1.01, 0.99):
                original = weight[row, column].item()
                with torch.no_grad():
                    weight[row, column] = original * gate
                    logits = model(input_ids=ids[None]).logits[0, :-1]
                    sides.append(float(nn.functional.cross_entropy(logits, ids[1:])))
                    weight[row, column] = original
            changes.append((sides[0] - sides[1]) / 0.02)
        found = torch.tensor(changes, dtype=torch.float64)
        expected = found.mean().abs() if average == "gradient" else found.abs().mean()
        assert float(score[row, column]) == pytest.approx(float(expected), rel=1e-2, abs=1e-9)
