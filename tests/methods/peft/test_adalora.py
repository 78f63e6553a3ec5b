"""AdaLoRA's importances, budget and masks against peft's, and what a fit of any length leaves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from toys_training import fit, seen

from effbench.checks import probe, toy_run
from effbench.core.recipe import parse_step
from effbench.core.run import Step
from effbench.core.views import Site
from effbench.methods.peft.adalora import AdaLoRA, SVDLinear, choose, importance
from effbench.nn.files import artifact

with safe_open(Path(__file__).parent.parent.parent / "golden" / "low_rank.safetensors", "pt") as file:
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    FACTS = file.metadata()

STEPS, WARMUP, FINAL, INTERVAL = (int(FACTS[name]) for name in ("steps", "warmup", "final", "interval"))
NAMES = {"p": "lora_B", "singular": "lora_E", "q": "lora_A"}
METHOD = AdaLoRA(
    rank=2, initial_rank=4, warmup=WARMUP / STEPS, final=FINAL / STEPS, interval=INTERVAL / STEPS, alpha=6.0
)


class Stub(SimpleNamespace):
    """As much of a run as the hooks of a step ask for."""

    def state(self, method: Any) -> dict[str, Any]:
        return self.kept


def beside(out: int, width: int) -> Any:
    site = Site(path="q_proj", kind="linear", role="q", block=0, seed=0)
    return METHOD.replace(nn.Linear(width, out), site)


def test_importances_budget_and_masks_are_those_of_peft() -> None:
    sizes = json.loads(FACTS["sizes"])
    run: Any = Stub(model=nn.ModuleList(beside(*size) for size in sizes), kept={})
    budgets = json.loads(FACTS["budgets"])
    masked = returned = 0
    left = [torch.ones(4, 1, dtype=torch.bool)] * len(sizes)
    for step in range(1, STEPS + 1):
        for number, module in enumerate(run.model):
            for ours, theirs in NAMES.items():
                parameter = getattr(module, ours)
                parameter.data = GOLDEN[f"ranks.{step}.{number}.{theirs}"].clone()
                parameter.grad = GOLDEN[f"ranks.{step}.{number}.{theirs}.grad"].clone()
        run.step = Step(step - 1, STEPS)
        METHOD.on_step(run)
        for number, module in enumerate(run.model):
            assert torch.equal(module.singular, GOLDEN[f"ranks.{step}.{number}.lora_E.after"]), step
            returned += int((module.singular.bool() & ~left[number]).sum())
            left[number] = module.singular.bool()
        masked += int(sum(int((~kept).sum()) for kept in left) > 0)
        if step == STEPS - FINAL - 1:
            for what in ("sensitivity", "uncertainty"):
                for number in range(len(sizes)):
                    for ours, theirs in NAMES.items():
                        mine = run.kept[what][f"{number}.{ours}"]
                        their = GOLDEN[f"ranks.{step}.{number}.{theirs}.{what}"]
                        torch.testing.assert_close(mine, their, rtol=1e-6, atol=1e-12)
        done = (step - WARMUP) / (STEPS - FINAL - WARMUP)
        if WARMUP < step <= STEPS - FINAL:
            assert METHOD.budget(len(sizes), done) == budgets[step - 1]
    final = range(STEPS - FINAL, STEPS + 1)
    assert masked == len(final) + sum(step % INTERVAL == 0 for step in range(WARMUP + 1, STEPS - FINAL))
    assert returned > 0  # lambdas that were masked count again
    assert sum(int(kept.sum()) for kept in left) == 2 * len(sizes) and run.kept.keys() == {"kept"}


def test_the_importance_is_no_gradient_times_lambda() -> None:
    # lambda * sqrt(sum of squared gradients) would choose others.
    module, generator = beside(6, 10), torch.Generator().manual_seed(0)
    state: dict[str, Any] = {}
    squares = torch.zeros(4)
    for _ in range(5):
        for name in NAMES:
            parameter = getattr(module, name)
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        METHOD.follow({"x": module}, state)
        squares += module.singular.grad.flatten().square()
    ours, other = importance("x", state), module.singular.detach().flatten() * squares.sqrt()
    assert ours.argsort().tolist() != other.argsort().tolist()
    s = {name: state["sensitivity"][f"x.{name}"] * state["uncertainty"][f"x.{name}"] for name in NAMES}
    for k in range(4):  # S_k by hand
        expected = float(s["singular"][k, 0]) + float(s["p"][:, k].mean()) + float(s["q"][k].mean())
        assert float(ours[k]) == pytest.approx(expected)
    assert choose({"x": module}, state, 0)["x"].sum() == 0


def test_the_regularizer_is_the_norm_and_not_its_square() -> None:
    found = {name.removeprefix("adalora."): value for name, value in GOLDEN.items() if name.startswith("adalora.")}
    method = AdaLoRA(rank=2, initial_rank=4, alpha=6.0)
    module: Any = method.replace(nn.Linear(40, 24), Site(path="x", kind="linear", role="q", block=0, seed=0))
    for ours, theirs in NAMES.items():
        getattr(module, ours).data = found[theirs].clone()
    run: Any = Stub(model=nn.ModuleList([module]))
    term = method.loss({}, None, run)["orthogonality"]
    assert float(term.detach()) == pytest.approx(float(found["loss"] - found["y"].square().mean()), abs=1e-5)
    eye = torch.eye(4, dtype=torch.float64)
    p, q = module.p.detach().double(), module.q.detach().double()
    norms = [float((p.T @ p - eye).square().sum()) ** 0.5, float((q @ q.T - eye).square().sum()) ** 0.5]
    assert float(term.detach()) == pytest.approx(0.5 * sum(norms) / 2, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("shares", ["", "warmup=0, final=0, ", "warmup=0.6, final=0.39, "])
def test_after_a_fit_of_any_length_the_ranks_are_those_of_the_budget(steps: int, shares: str) -> None:
    run = toy_run()
    run.apply(parse_step(f"adalora(rank=2, initial_rank=5, {shares}merge='separate')"))
    fit(run, steps=steps, lr=1e-2)
    modules = [module for module in run.model.modules() if isinstance(module, SVDLinear)]
    assert sum(int(module.singular.bool().sum()) for module in modules) == 2 * 14
    before = probe(run)
    run.settle()
    assert sum(len(module.q) for module in modules) == 2 * 14 and torch.allclose(probe(run), before, atol=1e-5)


def test_the_budget_falls_by_the_cube_and_is_held() -> None:
    run = toy_run()
    run.apply(AdaLoRA(rank=2, initial_rank=6, warmup=0.2, final=0.3))
    seen_ranks: list[int] = []

    def count(run: Any) -> None:
        modules = [module for module in run.model.modules() if isinstance(module, SVDLinear)]
        seen_ranks.append(sum(int(module.singular.bool().sum()) for module in modules))

    seen(run, count)
    fit(run, steps=20, lr=1e-2)
    left = [(14 - step) / 10 for step in range(5, 15)]
    expected = [6 * 14] * 4 + [int(2 * 14 + 4 * 14 * share**3) for share in left] + [2 * 14] * 6
    assert seen_ranks == expected


def test_ranks_go_to_some_matrices_and_are_saved(tmp_path: Path) -> None:
    run = toy_run()
    run.apply(AdaLoRA(rank=1, initial_rank=4, merge="separate"))
    fit(run, steps=12, lr=1e-2)
    run.finish()
    ranks = {len(module.q) for module in run.model.modules() if isinstance(module, SVDLinear)}
    assert len(ranks) > 1
    artifact.save(run.model, tmp_path / "m", run.storage)
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        assert torch.equal(artifact.load(tmp_path / "m")(ids).logits, run.model(ids).logits)
