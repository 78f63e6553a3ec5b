"""Movement pruning: schedule, scores and learning rates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit, linear, linears, seen, watch_groups

from effbench.checks import toy_run
from effbench.methods.prune.movement import Movement, ScoredMask
from effbench.nn.model.linear import kept


def test_movement_schedule_is_the_published_one() -> None:
    """In terms of the fraction kept, with warm-up and cool-down in multiples of some steps."""
    total, unit, final = 100, 10, 0.15
    for done in range(total + 1):
        if done <= unit:
            threshold = 1.0
        elif done > total - 2 * unit:
            threshold = final
        else:
            threshold = final + (1 - final) * (1 - (done - unit) / (total - 3 * unit)) ** 3
        assert 1 - Movement(sparsity=0.85).at(done, total) == pytest.approx(threshold)
    assert Movement(begin=0.0, end=1.0).at(3, 3) == 0.5 == Movement(begin=1.0, end=1.0).at(3, 3)


def test_movement_scores_are_the_closed_form() -> None:
    """S = -lr * sum over steps of W * dL/dW', with dL/dW' the gradient at the masked weights."""
    generator = torch.Generator().manual_seed(1)
    plain, x, y = linear(), torch.randn(32, 16, generator=generator), torch.randn(32, 8, generator=generator)
    module = ScoredMask(plain, "x", 0, "unstructured")
    optimizer = torch.optim.SGD([{"params": [module.score], "lr": 0.5}, {"params": [plain.weight], "lr": 0.05}])
    expected = torch.zeros(8, 16)
    weight = plain.weight.detach().clone()
    for step in range(6):
        masked = weight * module.mask
        gradient = 2 * (x @ masked.T - y).T @ x / y.numel()
        expected -= 0.5 * weight * gradient
        weight = weight - 0.05 * gradient * module.mask  # masked weights stand still, their scores do not
        (module(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        module.mask = module.choose(0.1 * (step + 1))
    assert torch.allclose(module.score, expected, atol=1e-5)
    assert torch.allclose(plain.weight, weight, atol=1e-5)
    assert int((~module.mask).sum()) == int(0.6 * 128)
    assert module.score[module.mask].min() >= module.score[~module.mask].max()


def test_movement_keeps_what_moves_away_from_zero() -> None:
    """Small growing weights win over large shrinking ones: the opposite of magnitude."""
    plain = nn.Linear(4, 1, bias=False)
    plain.weight.data = torch.tensor([[1.0, -1.0, 0.1, -0.1]])
    target = torch.tensor([[0.8, -0.8, 0.3, -0.3]])
    module = ScoredMask(plain, "x", 0, "unstructured")
    (module(torch.eye(4)) - target.T).square().sum().backward()
    assert module.score.grad is not None
    module.score.data -= module.score.grad
    assert module.choose(0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("freeze", [True, False])
def test_movement_has_its_own_learning_rate_and_still_embeddings(freeze: bool) -> None:
    run = toy_run("gpt2")
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    scores: dict[str, Tensor] = {}
    groups = watch_groups(run)

    def watch(run: Any) -> None:
        scores.update({m.path: m.score.detach().clone() for m in run.model.modules() if isinstance(m, ScoredMask)})

    run.apply(Movement(freeze_embeddings=freeze))
    seen(run, watch)
    fit(run, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0), (1e-2, 0.0)]
    assert len(groups[2]["params"]) == len(scores) == len(linears(run))
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        after = run.model.get_parameter(name)
        assert after.requires_grad and torch.equal(after, before[name]) == freeze
    assert not torch.equal(run.model.get_parameter("transformer.ln_f.weight"), before["transformer.ln_f.weight"])
    for path, module in linears(run).items():
        keep = kept(module)
        assert keep is not None and scores[path][keep].min() >= scores[path][~keep].max()
