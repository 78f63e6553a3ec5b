"""Runs and measures that tests of structured pruning share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench import checks
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import replace
from effbench.nn.run import ModelRun

ARCHITECTURES = list(checks.DENSE)


IDS = torch.arange(48).view(2, 24) * 7 % 95 + 1


def make_run(architecture: str = "llama", layers: int = 2, double: bool = False, **settings: Any) -> ModelRun:
    """A toy run whose biases are not zero, in float64 if asked for."""
    run = checks.toy_run(architecture, **({"sequences": 4, "length": 16} | settings))
    run.model = checks.toy(architecture, layers=layers)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in run.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    if double:
        run.model.double()
        for path, module in list(run.model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):  # those of transformers compute in float32
                norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
                norm.weight = module.weight
                replace(run.model, path, norm)
    return run


def logits(model: Any, **keywords: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False, **keywords).logits


def loss(run: ModelRun) -> Tensor:
    """[sequences] float64: the loss of each calibration sequence, which transformers computes in float32."""
    ids = run.calibration()
    with torch.no_grad():
        found = run.model(input_ids=ids).logits[:, :-1].double().transpose(1, 2)
    return nn.functional.cross_entropy(found, ids[:, 1:], reduction="none").mean(1)


def zero_inputs(linear: nn.Module, gone: Tensor) -> None:
    """Take away what a linear makes of the inputs at `gone`."""
    weight = linear.weight.data
    (weight.T if not isinstance(linear, Conv1D) else weight)[gone] = 0


def parts(run: ModelRun, index: int, *names: str) -> list[nn.Module]:
    return [Blocks(run.model).blocks[index].get_submodule(name) for name in names]


def without(number: int, gone: list[int]) -> Tensor:
    return torch.tensor([index for index in range(number) if index not in gone])
