"""What trl's GKD makes of the logits of a student and a teacher: divergences over the labels, and their gradients."""

from __future__ import annotations

import torch
from golden import write
from torch import Tensor
from trl.experimental.gkd import GKDTrainer

ROWS, LENGTH, VOCABULARY = 3, 8, 96
SETTINGS = [(0.0, 1.0), (1.0, 1.0), (0.1, 1.0), (0.5, 1.0), (0.1, 2.0)]  # beta, temperature


def main() -> None:
    """Logits [B, T, V] predict the labels [B, T] of the same place; -100 masks. Computed in float64."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator)
    student = 0.5 * teacher + torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[0, :3] = labels[1, 5:] = -100
    tensors: dict[str, Tensor] = {"teacher": teacher, "student": student, "labels": labels}
    for beta, temperature in SETTINGS:
        z = student.double().requires_grad_()
        loss = GKDTrainer.generalized_jsd_loss(z, teacher.double(), labels, beta=beta, temperature=temperature)
        loss.backward()
        tensors |= {f"{beta}/{temperature}/loss": loss.detach(), f"{beta}/{temperature}/gradient": z.grad.float()}
    write("trl_jsd", __file__, ["trl"], tensors, function="trl.experimental.gkd GKDTrainer.generalized_jsd_loss")


main()
