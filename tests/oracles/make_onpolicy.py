"""What trl's GKD and MiniLLM compute: divergences and their gradients, advantages, single-step terms."""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch
from golden import write
from torch import Tensor

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from trl.experimental.gkd import GKDTrainer
from trl.experimental.minillm import MiniLLMTrainer

ROWS, WIDTH, VOCABULARY = 2, 5, 11
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (1.0, 2.0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw.generator, dtype=torch.float64)  # type: ignore[attr-defined]


def make() -> dict[str, Tensor]:
    """All in float64. trl's MiniLLM masks nothing: rows are whole. Its single step takes logarithms [B, T, V]."""
    draw.generator = torch.Generator().manual_seed(0)  # type: ignore[attr-defined]
    student, teacher = 2 * draw(ROWS, WIDTH, VOCABULARY), 2 * draw(ROWS, WIDTH, VOCABULARY)
    labels = torch.randint(VOCABULARY, (ROWS, WIDTH), generator=draw.generator)  # type: ignore[attr-defined]
    labels[0, :2] = -100
    found = {"student": student, "teacher": teacher, "labels": labels}
    for beta in BETAS:
        for temperature in TEMPERATURES:
            z = student.clone().requires_grad_()
            loss = GKDTrainer.generalized_jsd_loss(z, teacher, labels=labels, beta=beta, temperature=temperature)
            (gradient,) = torch.autograd.grad(loss, z)
            found |= {f"jsd.{beta}.{temperature}": loss.detach(), f"jsd.{beta}.{temperature}.grad": gradient}
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    tokens = labels.clamp(min=0)[..., None]
    own, theirs = q.gather(-1, tokens)[..., 0], p.gather(-1, tokens)[..., 0]
    found |= {"tokens": tokens[..., 0]}
    for name, gamma, norm in (("norm", 1.0, True), ("sum", 1.0, False), ("none", 0.0, False)):
        trainer = SimpleNamespace(gamma=gamma, length_normalization=norm)
        found[f"advantage.{name}"] = MiniLLMTrainer._compute_advantage(trainer, own, theirs)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    found["single"] = MiniLLMTrainer._single_step_decomposition_loss(SimpleNamespace(), q, p, mask)
    return found


if __name__ == "__main__":
    write("onpolicy", __file__, ["trl"], make())
