"""Fits and linears that tests of pruning during training share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from effbench.core.kinds import Train
from effbench.core.run import FitReport
from effbench.methods.prune.learned_mask import CandidateMask
from effbench.nn.model.blocks import Blocks
from effbench.nn.run import ModelRun
from effbench.nn.train import fit as library
from effbench.nn.train.settings import FitSettings

METHODS = ["gmp()", "movement()", "learned_mask()", "learned_mask(pattern='unstructured')"]


def fit(run: ModelRun, start: int = 0, **changes: Any) -> FitReport:
    settings = FitSettings(steps=5, lr=1e-3, batch_size=4, schedule="constant", warmup=0.0, clip=None, max_length=32)
    return library.fit(run, dataclasses.replace(settings, **changes), start)


def linears(run: ModelRun) -> dict[str, nn.Module]:
    return dict(Blocks(run.model).linears())


def seen(run: ModelRun, hook: Any) -> None:
    """Have `hook(run)` called after each step of the next fit, after the hooks there are by now."""

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        def on_step(self, run: Any) -> None:
            hook(run)

    run.apply(Watch())


def watch_groups(run: ModelRun) -> list[dict[str, Any]]:
    """The groups of the optimizer of the next fit, once it is there."""
    groups: list[dict[str, Any]] = []

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        def optimizer(self, groups_given: Any, run: Any) -> Any:
            optimizer = torch.optim.AdamW(groups_given)
            groups.extend(optimizer.param_groups)
            return optimizer

    run.apply(Watch())
    return groups


def linear(out: int = 8, width: int = 16, seed: int = 0, bias: bool = False) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(width, out, bias)
    module.weight.data = torch.randn(out, width, generator=generator)
    return module


def masks(run: Any) -> list[CandidateMask]:
    return [module for module in run.model.modules() if isinstance(module, CandidateMask)]
