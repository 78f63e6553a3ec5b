"""DataInf: against dattri, against the exact inverse for one example, and with the sign that helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys_attribution import GOLDEN, attributed, gradient, losses, target_loss

from effbench.checks import DENSE, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.methods.select import datainf
from effbench.methods.select.datainf import DataInf, attribute
from effbench.nn.run import ModelRun
from effbench.nn.train.example_gradients import Factor

LAYER = "model.layers.1.self_attn"


def adapted() -> tuple[ModelRun, list[Factor]]:
    """The run with the factors that dattri was given, beside queries and values of the last block."""
    run = attributed()
    run.apply(parse_step("lora(rank=2, alpha=4.0, targets=('q_proj', 'v_proj'))"))
    run.model.double()
    factors = []
    for role in "qv":
        path = f"{LAYER}.{role}_proj"
        module: Any = run.model.get_submodule(path)
        for name in "ab":
            module.get_parameter(name).data = GOLDEN[f"factor.{role}.{name}"].double()
            factors.append(Factor(path, module, name))
    return run, factors


def score(run: ModelRun, factors: list[Factor], damping: float = 0.1) -> Tensor:
    return attribute(run, factors, run.data.pool, run.data.target, damping)


def gradients(run: ModelRun, factors: list[Factor]) -> list[tuple[Tensor, Tensor]]:
    """Of each layer the gradients of all examples, [N, P], and that of the target's mean loss, [P]."""
    found = []
    for factor in factors:
        weight = factor.module.get_parameter(factor.name)
        each = torch.stack([gradient(loss, weight) for loss in losses(run.model, run.data.pool)])
        found.append((each, gradient(torch.stack(losses(run.model, run.data.target)).mean(), weight)))
    return found


def test_scores_are_those_of_dattri() -> None:
    expected = GOLDEN["datainf"]
    found = score(*adapted())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.std()))


def test_products_of_gradients_are_another_ranking() -> None:
    run, factors = adapted()
    plain = sum((each @ aim for each, aim in gradients(run, factors)), start=torch.zeros(()))
    places = score(run, factors).argsort(descending=True)[:18]
    assert len(set(places.tolist()) & set(plain.argsort(descending=True)[:18].tolist())) < 16


def test_one_example_is_inverted_exactly() -> None:
    run, factors = adapted()
    run.data.pool = run.data.pool[:1]
    expected = torch.zeros(1, dtype=torch.float64)
    for each, aim in gradients(run, factors):
        damping = 0.1 * each.square().mean()
        matrix = each.T @ each + damping * torch.eye(len(aim), dtype=torch.float64)
        expected += each @ torch.linalg.solve(matrix, aim)
    torch.testing.assert_close(score(run, factors), expected, rtol=1e-4, atol=1e-7)


def test_learning_the_best_ranked_helps_the_target_and_the_worst_ranked_hurts() -> None:
    run, factors = adapted()
    scores, before, changes = score(run, factors), target_loss(run), []
    weights = [factor.module.get_parameter(factor.name) for factor in factors]
    for place in (int(scores.argmax()), int(scores.argmin())):
        (loss,) = losses(run.model, [run.data.pool[place]])
        steps = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for sign in (-1, 1):
                for weight, step in zip(weights, steps, strict=True):
                    weight += sign * 1e-3 * step
                if sign < 0:
                    changes.append(target_loss(run) - before)
    assert changes[0] < 0 < changes[1]


def test_gradients_that_are_too_many_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run, factors = adapted()
    expected = score(run, factors)
    monkeypatch.setattr(datainf, "HELD", 0)
    assert torch.equal(score(run, factors), expected)


def test_a_layer_without_gradients_has_no_say() -> None:
    run, factors = adapted()
    for factor in factors:
        if factor.name == "b":
            factor.module.get_parameter("b").data.zero_()  # so that those of a are zero
    rest = [factor for factor in factors if factor.name == "b"]
    found = score(run, factors)
    assert found.isfinite().all()
    torch.testing.assert_close(found, score(run, rest))


@pytest.mark.parametrize("architecture", DENSE)
def test_factors_are_fitted_on_every_architecture_and_leave_no_trace(architecture: str) -> None:
    run = toy_run(architecture)
    run.apply(parse_step("lora_plus()"))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.apply(DataInf(steps=3, lr=1e-2, batch_size=4, rank=2))
    after = run.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert not run.log.fits and not run.waiting and len(run.data.train) == 13
    assert [method.key for method in run.train.chain("param_groups")] == ["lora_plus"]


def test_factors_stand_beside_the_linears_of_the_roles() -> None:
    run = toy_run()
    with run.aside("here"):
        factors = DataInf(rank=2)._place(run)
        assert {factor.path.rpartition(".")[2] for factor in factors} == {"q_proj", "v_proj"}
        assert [factor.name for factor in factors] == ["a", "b"] * 4
    with pytest.raises(Unsupported, match="no linear that may be touched"):
        toy = toy_run("gpt2")
        DataInf(roles=("gate",)).score(toy.data.pool, toy)


def test_bad_settings_are_wrong_usage() -> None:
    for settings in ({"rank": 0}, {"damping": 0.0}, {"roles": ()}, {"lr": (1e-3, 1e-4)}, {"steps": 0}):
        with pytest.raises(Usage):
            DataInf(**settings)
