"""Weights that llm-compressor's Wanda and SparseGPT leave of a small matrix, unstructured and n:m."""

from __future__ import annotations

import torch
from golden import write
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify as sparsegpt
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify as wanda
from torch import Tensor, nn

OUT, IN, BLOCK, DAMP = 32, 128, 32, 0.01
# name: sparsity, weights removed of every m, m (0: unstructured)
SETTINGS: dict[str, tuple[float, int, int]] = {
    "s30": (0.3, 0, 0),
    "s50": (0.5, 0, 0),
    "s70": (0.7, 0, 0),
    "2:4": (0.5, 2, 4),
    "4:8": (0.5, 4, 8),
}


def factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, by the steps that `sparsify_weight` takes inside."""
    damped = hessian.clone()
    dead = damped.diagonal() == 0
    damped[dead, dead] = 1
    damped.diagonal().add_(DAMP * damped.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def tensors(seed: int) -> dict[str, Tensor]:
    """A weight, inputs of two sequences with one dead input, and what is left of the weight in every setting."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator) * 0.02
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5 + torch.eye(IN)
    inputs = torch.randn(2, 2 * IN, IN, generator=generator) @ mixing * (0.2 + torch.rand(IN, generator=generator))
    inputs[..., 17] = 0
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight.data = weight
    found = {"weight": weight, "inputs": inputs.half()}
    inputs = inputs.half().float()

    hessian, seen = sparsegpt.make_empty_hessian(linear), 0
    scalars, counted = wanda.make_empty_row_scalars(linear), 0
    for sequence in inputs:
        hessian, seen = sparsegpt.accumulate_hessian(sequence, linear, hessian, seen)
        scalars, counted = wanda.accumulate_row_scalars(sequence, linear, scalars, counted)
    found |= {"hessian": hessian.clone(), "factor": factor(hessian)}
    for name, (sparsity, removed, of) in SETTINGS.items():
        found[f"wanda.{name}"] = wanda.sparsify_weight(linear, {linear: scalars.clone()}, sparsity, removed, of)
        _, left = sparsegpt.sparsify_weight(
            linear, {linear: hessian.clone()}, sparsity, removed, of, BLOCK, DAMP, preserve_sparsity_mask=False
        )
        found[f"sparsegpt.{name}"] = left.detach().clone()
    return {name: tensor.detach() for name, tensor in found.items()}


if __name__ == "__main__":
    write("prune", __file__, ["llmcompressor"], tensors(0), block=BLOCK, damp=DAMP, settings=SETTINGS)
