"""Hard-concrete gates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit, linear, linears, seen

from effbench.checks import toy_run
from effbench.methods.prune._l0 import BETA, HIGH, LOW, HardConcreteMask, close, density
from effbench.methods.prune.learned_mask import LearnedMask
from effbench.nn.model.linear import dense_weight, kept


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 2.0])
def test_hard_concrete_gates_have_their_closed_forms(log_alpha: float) -> None:
    module = HardConcreteMask(nn.Linear(500, 400, bias=False), "x", 0)
    module.log_alpha.data.fill_(log_alpha)
    gate = module.gate().detach()
    samples = gate.numel()

    def above(value: float) -> float:
        """P(z > value) for 0 <= value < 1: the logistic noise must carry the stretched gate over it."""
        s = (value - LOW) / (HIGH - LOW)
        return 1 / (1 + math.exp(-(log_alpha - BETA * math.log(s / (1 - s)))))

    error = 5 * 0.5 / math.sqrt(samples)
    assert float((gate > 0).float().mean()) == pytest.approx(above(0.0), abs=error)
    assert float(module.open().detach().mean()) == pytest.approx(above(0.0), abs=1e-5)
    assert float((gate == 1).float().mean()) == pytest.approx(above(1.0 - 1e-9), abs=error)
    mean = sum(above((i + 0.5) / 2000) for i in range(2000)) / 2000  # the mean of z is the integral of P(z > t)
    assert float(gate.mean()) == pytest.approx(mean, abs=error)


def test_gates_are_pressed_to_the_sparsity_and_no_further() -> None:
    masks = [HardConcreteMask(linear(seed=i), str(i), 0) for i in range(2)]
    method = LearnedMask(pattern="unstructured", sparsity=0.7)
    run: Any = type("Stub", (), {"model": nn.ModuleList(masks)})
    optimizer = torch.optim.Adam([mask.log_alpha for mask in masks], lr=0.1)
    slopes = []
    for _ in range(200):
        optimizer.zero_grad()
        method.loss({}, None, run)["density"].backward()
        probability = masks[0].open().detach()
        gradient = masks[0].log_alpha.grad
        assert gradient is not None
        slopes.append(float((gradient / (probability * (1 - probability))).mean()) * 256)
        optimizer.step()
    assert float(density(masks).detach()) == pytest.approx(0.3, abs=0.02)
    assert slopes[0] == pytest.approx(125.0, rel=1e-3) and min(slopes) == pytest.approx(-125.0, rel=1e-3)


def test_closed_gates_are_the_least_of_all_linears_together() -> None:
    masks = [HardConcreteMask(linear(seed=i), str(i), 0) for i in range(2)]
    masks[0].log_alpha.data += torch.linspace(-1, 3, 128).view(8, 16)
    close(masks, 0.25)
    alphas = torch.cat([mask.log_alpha.detach().flatten() for mask in masks])
    keep = torch.cat([mask.result()[1].flatten() for mask in masks])
    assert int((~keep).sum()) == 64 and alphas[keep].min() > alphas[~keep].max()
    weight, keep = masks[0].result()
    gate = (torch.sigmoid(masks[0].log_alpha) * 1.2 - 0.1).clamp(0, 1)
    pruned = masks[0].finish("unstructured")
    assert torch.allclose(dense_weight(pruned), masks[0].linear.weight * gate * keep)
    assert (gate[keep] < 1).any() and weight.shape == (8, 16)
    masks[0].chosen.fill_(True)
    whole = masks[0].finish("unstructured")  # nothing is pruned, but the gates count
    assert type(whole) is nn.Linear and torch.allclose(whole.weight, masks[0].linear.weight * gate)


def test_gates_and_weights_train_together() -> None:
    run = toy_run()
    before = dense_weight(linears(run)["model.layers.0.mlp.up_proj"]).clone()
    alphas: list[Tensor] = []
    run.apply(LearnedMask(pattern="unstructured"))
    seen(
        run,
        lambda run, *_: alphas.append(
            next(m for m in run.model.modules() if isinstance(m, HardConcreteMask)).log_alpha
        ),
    )
    fit(run, steps=3)
    after = linears(run)["model.layers.0.mlp.up_proj"]
    mask = kept(after)
    assert mask is not None and not torch.allclose(dense_weight(after)[mask], before[mask], atol=1e-4)
    assert float(alphas[-1].detach().mean()) == pytest.approx(
        math.log(9) - 0.3, abs=0.05
    )  # three steps of Adam at 0.1, down
