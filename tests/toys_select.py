"""Golden choices, and pools that tests of selectors share."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from effbench.checks import VOCABULARY, toy_run
from effbench.core.views import Example
from effbench.nn.run import ModelRun


def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "golden" / "diversity.safetensors")


def pooled(rows: list[tuple[int, ...]], seed: int = 0) -> ModelRun:
    """A toy run with these tokens in its pool, numbered."""
    run = toy_run(seed=seed)
    run.data.pool = [Example(str(place), row) for place, row in enumerate(rows)]
    return run


def draw_rows(number: int, length: int = 24, seed: int = 0) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [tuple(chance.randrange(1, VOCABULARY) for _ in range(length)) for _ in range(number)]


def kept(run: ModelRun) -> list[int]:
    return [int(example.id) for example in run.data.train]


def ranked(scores: Tensor) -> list[int]:
    return [int(place) for place in scores.argsort(descending=True, stable=True)]


def blobs(sizes: list[int], spread: float = 0.01, width: int = 8, seed: int = 0) -> Tensor:
    """Directions in clusters of these sizes, one behind the other."""
    chance = torch.Generator().manual_seed(seed)
    centres = torch.eye(width)[: len(sizes)].repeat_interleave(torch.tensor(sizes), 0)
    return torch.nn.functional.normalize(centres + spread * torch.randn(centres.shape, generator=chance), dim=1)
