"""Word-level distillation: trl's divergences over the learned tokens, in every layout, and no hard label."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from toys_distill import EXAMPLES, check_layouts, layouts, pair, terms
from toys_training import fit

from effbench.checks import toy_run
from effbench.core.errors import Conflict, Usage
from effbench.core.recipe import parse, parse_step
from effbench.methods.distill.student import Student
from effbench.methods.distill.token_kd import TokenKD

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "trl_jsd.safetensors"
SETTINGS: dict[str, dict[str, Any]] = {
    "0.0/1.0": {"divergence": "forward"},
    "1.0/1.0": {"divergence": "reverse"},
    "0.1/1.0": {"divergence": "jsd", "beta": 0.1},
    "0.5/1.0": {"divergence": "jsd", "beta": 0.5},
    "0.1/2.0": {"divergence": "jsd", "beta": 0.1, "temperature": 2.0},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_terms_and_gradients_are_trls(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(GOLDEN, "pt") as file:
        teacher, student, labels = (file.get_tensor(name) for name in ("teacher", "student", "labels"))
        loss, gradient = (file.get_tensor(f"{case}/{name}") for name in ("loss", "gradient"))
    # Logits of a place predict the label of the next.
    z = student.double().requires_grad_()
    behind = torch.zeros(3, 1, 96, dtype=torch.float64)
    out = SimpleNamespace(logits=torch.cat([z, behind], 1))
    run = toy_run()
    taught = SimpleNamespace(logits=torch.cat([teacher.double(), behind], 1))
    monkeypatch.setattr(run, "outputs", lambda role: taught)
    batch = {"labels": torch.cat([torch.full((3, 1), -100), labels], 1)}
    (value,) = TokenKD(**SETTINGS[case]).loss(batch, out, run).values()
    value.backward()
    assert float(value.detach()) == pytest.approx(float(loss), rel=1e-12)
    assert torch.allclose(z.grad.float(), gradient, rtol=1e-5, atol=1e-9)  # type: ignore[union-attr]


def closed_form(p: Tensor, q: Tensor, divergence: str, beta: float) -> Tensor:
    """Divergences [N] of probabilities [N, V] of the teacher and the student, in words."""
    m = beta * p + (1 - beta) * q
    kl = {name: (a * (a / b).log()).sum(-1) for name, a, b in (("pq", p, q), ("qp", q, p), ("pm", p, m), ("qm", q, m))}
    return {"forward": kl["pq"], "reverse": kl["qp"], "jsd": beta * kl["pm"] + (1 - beta) * kl["qm"]}[divergence]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_is_the_mean_divergence_of_the_learned_tokens(settings: dict[str, Any]) -> None:
    run = pair()
    method = TokenKD(teacher="teacher", **settings)
    values, weights = [], []
    for example in EXAMPLES:
        first = max(1, example.prompt)
        z, v = (
            (run.role(role)(torch.tensor([example.ids])).logits[0, first - 1 : -1] / method.temperature).softmax(-1)
            for role in ("model", "teacher")
        )
        values.append(closed_form(v, z, method.divergence, method.beta))
        weights.append(torch.full_like(values[-1], example.weight))
    expected = (torch.cat(values) * torch.cat(weights)).sum() / torch.cat(weights).sum()
    for name, batch in layouts(run).items():
        (found,) = terms(run, method, batch).values()
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-9), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_layouts_are_alike(architecture: str) -> None:
    check_layouts(pair(architecture), TokenKD(teacher="teacher", divergence="jsd"))


def test_there_is_no_hard_label_and_the_log_tells_of_it(tmp_path: Path) -> None:
    run = toy_run()
    run.data.pool = run.data.pool[:4]
    run.apply(Student(layers=1))
    with torch.no_grad():
        run.reference.lm_head.weight.mul_(20)  # so that it prefers some tokens
    run.apply(TokenKD())
    run.folder = tmp_path
    fit(run, steps=30, lr=3e-3)
    first, *_, last = map(json.loads, (tmp_path / "fit-1.jsonl").read_text().splitlines())
    assert first["terms"].keys() == {"token_kd.forward"} and first["loss"] == first["terms"]["token_kd.forward"]
    assert first["watched"].keys() == {"token_kd.agreement", "token_kd.cross_entropy"}
    assert last["loss"] < 0.5 * first["loss"] and last["watched"]["token_kd.cross_entropy"] > 4.0  # random tokens
    assert last["watched"]["token_kd.agreement"] > first["watched"]["token_kd.agreement"] + 0.2


def test_two_methods_in_the_place_of_the_cross_entropy_conflict() -> None:
    with pytest.raises(Conflict, match=r"train\.loss is already set by kd"):
        parse("student(), kd(), token_kd(), fit()")


@pytest.mark.parametrize("steps", ["beta=0.0", "beta=1.0", "temperature=0", "teacher='model'", "divergence='both'"])
def test_settings_that_no_data_can_make_right(steps: str) -> None:
    with pytest.raises(Usage):
        parse_step(f"token_kd({steps})")
