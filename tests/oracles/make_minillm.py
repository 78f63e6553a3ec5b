"""What trl's MiniLLM computes: advantages and the single-step term."""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch
from golden import write
from torch import Tensor

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from trl.experimental.minillm import MiniLLMTrainer

ROWS, WIDTH, VOCABULARY = 2, 5, 11


def make() -> dict[str, Tensor]:
    """All in float64. trl's MiniLLM masks nothing: rows are whole. Its single step takes logarithms [B, T, V]."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, ROWS, WIDTH, VOCABULARY, generator=generator, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (ROWS, WIDTH), generator=generator)
    found = {"student": student, "teacher": teacher, "tokens": tokens}
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    own, theirs = (logprobs.gather(-1, tokens[..., None])[..., 0] for logprobs in (q, p))
    for name, gamma, norm in (("norm", 1.0, True), ("sum", 1.0, False), ("none", 0.0, False)):
        trainer = SimpleNamespace(gamma=gamma, length_normalization=norm)
        found[f"advantage.{name}"] = MiniLLMTrainer._compute_advantage(trainer, own, theirs)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    found["single"] = MiniLLMTrainer._single_step_decomposition_loss(SimpleNamespace(), q, p, mask)
    return found


if __name__ == "__main__":
    write("minillm", __file__, ["trl"], make())
