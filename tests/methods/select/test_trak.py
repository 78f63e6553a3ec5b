"""TRAK: against dattri, by hand, and beside training anew on parts of the train set."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from toys_attribution import GOLDEN, attributed, together

from effbench.checks import toy_run
from effbench.core.errors import Usage
from effbench.methods.select import trak
from effbench.methods.select.trak import TRAK, attribute, find_features
from effbench.nn.model.feed import feed
from effbench.nn.run import ModelRun
from effbench.nn.train import projections
from effbench.nn.train.example_gradients import average, find_matrices, mean_loss, token_margins
from effbench.nn.train.projections import Signs


def score(run: ModelRun, **settings: Any) -> Tensor:
    return TRAK(**settings).score(run.data.pool, run)


def test_scores_are_those_of_dattri() -> None:
    expected = GOLDEN["trak"].mean(1)
    torch.testing.assert_close(score(attributed()), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_products_of_gradients_alone_are_another_ranking() -> None:
    run = attributed()
    parts = find_matrices(run, 1, ("v",))
    (mine, doubts), (theirs, _) = (
        find_features(run, examples, parts, Signs(64, 64, ""), name)
        for name, examples in (("a", run.data.pool), ("b", run.data.target))
    )
    plain = mine @ theirs.T * doubts[:, None]  # without (Phi^T Phi)^-1
    assert spearmanr(plain.mean(1), GOLDEN["trak"].mean(1)).statistic < 0.8
    without = attribute(mine, theirs, 0.0)  # and without the share of the loss that is left to learn
    assert not torch.allclose(without, GOLDEN["trak"], rtol=0.05, atol=0.05 * float(GOLDEN["trak"].std()))


def test_an_ensemble_multiplies_means(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = torch.Generator().manual_seed(0)
    draws = [torch.rand(n, 6, generator=chance, dtype=torch.float64) for n in (90, 5, 90, 5)]
    doubts = torch.rand(2, 90, generator=chance, dtype=torch.float64)
    given = iter([(draws[0], doubts[0]), (draws[1], None), (draws[2], doubts[1]), (draws[3], None)])
    monkeypatch.setattr(trak, "find_features", lambda *_: next(given))
    inner = sum(f @ torch.linalg.inv(f.T @ f + 0.5 * torch.eye(6)) @ g.T for f, g in (draws[:2], draws[2:])) / 2
    expected = nn.functional.softshrink(inner * doubts.mean(0)[:, None], 0.01).mean(1)
    found = score(attributed(), ensemble=2, steps=1, damping=0.5, threshold=0.01)
    torch.testing.assert_close(found, expected)


def test_models_of_an_ensemble_are_fitted_on_shares_and_leave_no_trace() -> None:
    run = toy_run()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    plain = score(run, projection=16)
    seen: list[list[str]] = []
    fitted = trak.fit

    def watch(run: Any, settings: Any) -> Any:
        seen.append([example.id for example in run.data.train])
        return fitted(run, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trak, "fit", watch)
        other = score(run, projection=16, ensemble=2, steps=3, lr=1e-2, batch_size=4)
    assert [len(set(ids)) for ids in seen] == [32, 32] and seen[0] != seen[1]
    assert not torch.allclose(plain, other) and not run.log.fits and run.train.empty
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_projections_keep_products_and_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(6, 9000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors[1] = vectors[0] + 0.3 * vectors[1]
    signs = Signs(9000, 2048, "0")
    found = signs.project(vectors)
    exact = vectors @ vectors.T
    assert float((found @ found.T - exact).abs().max() / exact.diagonal().min()) < 4 / 2048**0.5
    monkeypatch.setattr(projections, "HELD", 0)
    again = Signs(9000, 2048, "0")
    assert torch.equal(again.project(vectors), found) and not again._held
    assert not torch.allclose(Signs(9000, 2048, "1").project(vectors), found)
    matrix = signs.project(torch.eye(3, 9000, dtype=torch.float64)) * 2048**0.5
    assert torch.equal(matrix.abs().round(), torch.ones(3, 2048)) and abs(float(matrix.mean())) < 0.05
    assert torch.equal(Signs(30, 64, "0").project(vectors[:, :30]), vectors[:, :30])


def test_a_projection_of_half_the_dimensions_keeps_most_of_the_ranking() -> None:
    exact, projected = score(attributed(), damping=0.1), score(attributed(), projection=32, damping=0.1)
    assert spearmanr(exact, projected).statistic > 0.6


def test_scores_rank_as_training_anew_does() -> None:
    """The linear datamodeling score: sums of scores over parts of the train set, and margins after training on them."""
    run = attributed()
    pool, aims = run.data.pool, run.data.target
    weight: nn.Parameter = run.model.model.layers[-1].self_attn.v_proj.weight
    start, target = weight.detach().clone(), together(run, aims)

    def train(places: list[int]) -> Tensor:
        batch = together(run, [pool[place] for place in places])
        weight.data.copy_(start)
        optimizer = torch.optim.LBFGS([weight], max_iter=12, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = mean_loss(feed(run.model, batch).logits, batch).mean() + 0.2 * (weight - start).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            return average(token_margins(feed(run.model, target).logits, target), target)

    run.model.requires_grad_(False)
    weight.requires_grad_(True)
    train([*range(len(pool))])  # TRAK's model is the trained one
    scores = []
    for damping in (
        10.0,
        1e9,
    ):  # near the weight of the penalty in a sum over examples; and no (Phi^T Phi)^-1 to speak of
        for aim in aims:
            run.data.target = [aim]
            scores.append(score(run, damping=damping))
    parts = [random.Random(number).sample(range(len(pool)), 45) for number in range(24)]
    margins = torch.stack([train(part) for part in parts])
    sums = torch.stack([torch.stack([each[part].sum() for each in scores]) for part in parts])
    found = [float(spearmanr(sums[:, i], margins[:, i % len(aims)]).statistic) for i in range(len(scores))]
    whole, plain = (sum(half) / len(aims) for half in (found[: len(aims)], found[len(aims) :]))
    assert whole > 0.7 and whole > plain + 0.05


def test_bad_settings_are_wrong_usage() -> None:
    for settings in ({"ensemble": 2}, {"share": 0.0}, {"projection": 0}, {"threshold": -1.0}, {"lr": 0.0}):
        with pytest.raises(Usage):
            TRAK(**settings)
    run = attributed()
    run.data.target = []
    with pytest.raises(Usage, match="no target part"):
        score(run)
