"""Layers and golden masks that tests of one-shot pruning share."""

from __future__ import annotations

import ast
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from effbench.core.views import Layer
from effbench.nn.calibration import Inputs, view_layer
from effbench.nn.model.linear import MaskedLinear


def golden() -> tuple[dict[str, Tensor], dict[str, str]]:
    path = Path(__file__).parent / "golden" / "prune.safetensors"
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


GOLDEN, FACTS = golden()


SETTINGS: dict[str, tuple[float, int, int]] = ast.literal_eval(FACTS["settings"])


def make_layer(weight: Tensor, tokens: Tensor, keep: Tensor | None = None) -> Layer:
    """A layer that has seen `tokens` [N, in]."""
    inputs = Inputs({"norm", "hessian"}, len(tokens))
    inputs.add(tokens)
    linear: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    if keep is not None:
        linear = MaskedLinear.of(weight, keep)
    return view_layer("layer", linear, inputs, seed=0)


def random_layer(out: int = 24, width: int = 64, seed: int = 0, keep: float | None = None) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    tokens = torch.randn(256, width // 4, generator=generator) @ mixing[: width // 4]  # correlated, as in real models
    tokens += 0.3 * torch.randn(256, width, generator=generator)
    mask = None if keep is None else torch.rand(out, width, generator=generator) < keep
    return make_layer(weight, tokens, mask)
