"""Fifty steps of galore-torch's AdamW on a tall, a wide and a square matrix and a vector, in float64."""

from __future__ import annotations

import math
import warnings

import torch
from galore_torch import GaLoreAdamW
from golden import write
from torch import Tensor

SHAPES = {"tall": (12, 8), "wide": (8, 12), "square": (8, 8), "vector": (10,)}
RANK, EVERY, SCALE, LR, DECAY, STEPS = 3, 20, 0.25, 0.05, 0.1, 50


def gradient(parts: Tensor, step: int) -> Tensor:
    """A gradient that turns: of three parts [3, ...], the weight of each its own wave in the step."""
    return sum(part * math.cos((0.1 + 0.07 * k) * step + k) for k, part in enumerate(parts))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        parts = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        tensors |= {f"{name}.parts": parts, f"{name}.start": torch.randn(shape, generator=generator).double()}
    weights = {name: tensors[f"{name}.start"].clone().requires_grad_() for name in SHAPES}
    settings = dict(rank=RANK, update_proj_gap=EVERY, scale=SCALE, proj_type="std", weight_decay=DECAY)
    groups = [
        {"params": [weights["vector"]], "weight_decay": DECAY},
        {"params": [weight for name, weight in weights.items() if name != "vector"], **settings},
    ]
    optimizer = GaLoreAdamW(groups, lr=LR)
    for step in range(STEPS):
        for name, weight in weights.items():
            weight.grad = gradient(tensors[f"{name}.parts"], step)
        optimizer.step()
        for name, weight in weights.items():
            if step % 10 == 9:
                tensors[f"{name}.{step + 1}"] = weight.detach().clone()
            if step % EVERY == 0 and name != "vector":
                tensors[f"{name}.basis.{step}"] = optimizer.state[weight]["projector"].ortho_matrix.clone()
    facts = dict(rank=RANK, every=EVERY, scale=SCALE, lr=LR, weight_decay=DECAY, steps=STEPS)
    write("galore", __file__, ["galore-torch"], tensors, **facts)
