"""Influences: against dattri, against derivatives by hand, and with the sign that helps.

The model's own norms and softmax are in float32 even where it is in float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_attribution import GOLDEN, attributed, gradient, losses, target_loss

from effbench.checks import DENSE, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.views import Example
from effbench.methods.select import influence
from effbench.methods.select.influence import Influence, find_solution
from effbench.nn.run import ModelRun
from effbench.nn.train.example_gradients import find_matrices, multiply_hessian
from effbench.nn.train.examples import batches


def score(run: ModelRun, **settings: Any) -> Tensor:
    return Influence(**settings).score(run.data.pool, run)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_exact_influences_are_those_of_dattri(damping: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if damping < 1:  # dattri divides by what is not positive, too
        with pytest.raises(Unsupported, match="curves downwards"):
            score(attributed(), hessian="exact", damping=damping)
        monkeypatch.setattr(influence, "divide", torch.linalg.solve)
    found = score(attributed(), hessian="exact", damping=damping)
    expected = GOLDEN[f"influence.{damping}"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.std()))


def test_conjugate_gradients_solve_what_the_exact_form_solves() -> None:
    run = attributed()
    exact = score(run, hessian="exact", damping=1.0)
    torch.testing.assert_close(score(run, hessian="cg", damping=1.0), exact, rtol=1e-3, atol=1e-4 * float(exact.std()))
    single = attributed(torch.float32)
    found = score(single, hessian="cg", damping=1.0)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-3 * float(exact.std()))


def test_the_identity_is_a_product_of_gradients() -> None:
    run = attributed()
    weight = run.model.model.layers[-1].self_attn.v_proj.weight
    aim = gradient(torch.stack(losses(run.model, run.data.target)).mean(), weight)
    expected = torch.stack([gradient(loss, weight) @ aim for loss in losses(run.model, run.data.pool)])
    torch.testing.assert_close(score(run), expected, rtol=1e-5, atol=1e-6 * float(expected.std()))


@pytest.mark.parametrize("hessian", ["identity", "exact"])
def test_learning_the_best_ranked_helps_the_target_and_the_worst_ranked_hurts(hessian: Any) -> None:
    run = attributed()
    scores = score(run, hessian=hessian, damping=1.0)
    before, changes = target_loss(run), []
    weight = run.model.model.layers[-1].self_attn.v_proj.weight
    for place in (int(scores.argmax()), int(scores.argmin())):
        (loss,) = losses(run.model, [run.data.pool[place]])
        (step,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= 1e-3 * step
            changes.append(target_loss(run) - before)
            weight += 1e-3 * step
    assert changes[0] < 0 < changes[1]  # g . g_z with the other sign, as -g . H^-1 g_z is, ranks the other way round


@pytest.mark.parametrize("architecture", DENSE)
def test_every_architecture_agrees_with_autograd(architecture: str) -> None:
    run = toy_run(architecture)
    run.data.pool = [Example(e.id, e.ids[: 6 + i], i) for i, e in enumerate(run.data.pool[:3])]
    found = score(run, blocks=2, roles=("k", "v", "down"))
    assert found.isfinite().all() and found.unique().numel() == 3


def test_validation_may_be_aimed_at_instead() -> None:
    run = attributed()
    run.data.validation = list(reversed(run.data.target))
    torch.testing.assert_close(score(run, aim="validation"), score(run), rtol=1e-9, atol=1e-12)


def test_what_cannot_be_is_said() -> None:
    run = attributed()
    run.data.target = []
    with pytest.raises(Usage, match="no target part"):
        score(run)
    with pytest.raises(Unsupported, match="too many to write"):
        score(toy_run(), hessian="exact")
    with pytest.raises(Unsupported, match="curves downwards"):
        find_solution(lambda x: -x, torch.ones(3, dtype=torch.float64))
    with pytest.raises(Unsupported, match="do not arrive"):
        steep = torch.logspace(-9, 9, 500, dtype=torch.float64)
        find_solution(lambda x: steep * x, torch.ones(500, dtype=torch.float64))
    with pytest.raises(Usage, match="roles"):
        Influence(roles=("values",))
    with pytest.raises(Unsupported, match="no linear of roles gate"):
        score(toy_run("gpt2"), roles=("gate",))


@pytest.mark.parametrize("hessian", ["exact", "cg"])
def test_a_loss_that_curves_downwards_has_no_influences(hessian: Any) -> None:
    run = toy_run(shape={"hidden_size": 16})
    run.data.pool = run.data.pool[:8]
    (part,) = find_matrices(run, 1, ("v",))
    every = torch.eye(math.prod(part.shape))
    products = sum(multiply_hessian(run.model, [part], batch, every) for _, batch in batches(run, run.data.pool))
    least = float(torch.linalg.eigvalsh((products + products.T).double() / 2 / 8)[0])
    assert least < -0.01  # the default damping, which does not make it positive
    with pytest.raises(Unsupported, match=r"curves downwards by [\d.]+ .* larger by more") as refusal:
        score(run, hessian=hessian)
    if hessian == "exact":
        assert f"by {-least - 0.01:.2g} " in str(refusal.value)
    assert score(run, hessian=hessian, damping=0.01 - least).isfinite().all()


def test_the_exact_form_divides_by_a_positive_matrix_alone() -> None:
    chance = torch.Generator().manual_seed(0)
    root, vector = (torch.randn(*shape, generator=chance, dtype=torch.float64) for shape in ((6, 6), (6,)))
    torch.testing.assert_close(influence.divide(root @ root.T, vector), torch.linalg.solve(root @ root.T, vector))
    for flat in (torch.zeros(6), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -0.25])):
        with pytest.raises(Unsupported, match=rf"downwards by {max(0.0, -float(flat[-1])):.2g} "):
            influence.divide(flat.double().diag(), vector)


def test_the_hessian_is_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = influence.multiply_hessian
    monkeypatch.setattr(
        influence, "multiply_hessian", lambda *given: seen.append(len(given[2]["input_ids"])) or whole(*given)
    )
    score(attributed(), hessian="exact", sample=7, damping=10.0)
    assert sum(seen) == 7
