"""Magnitude pruning against torch's own, and blocks by their norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from toys_prune import random_layer

from effbench import checks
from effbench.methods.prune.block_sparse import BlockSparse
from effbench.methods.prune.magnitude import Magnitude
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.875])
def test_magnitude_leaves_what_torch_leaves(sparsity: float) -> None:
    layer = random_layer()
    linear = nn.Linear(64, 24, bias=False)
    linear.weight.data = layer.weight.clone()
    prune.l1_unstructured(linear, "weight", sparsity)
    assert torch.equal(dense_weight(Magnitude(sparsity).compress(layer)), linear.weight)


@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_global_magnitude_leaves_what_torch_leaves(sparsity: float) -> None:
    run, generator, linears = checks.toy_run(), torch.Generator().manual_seed(0), {}
    for number, (path, module) in enumerate(Blocks(run.model).linears()):
        assert isinstance(module, nn.Linear)
        module.weight.data.normal_(std=0.02 + 0.001 * number, generator=generator)  # those of the model have ties
        linears[path] = nn.Linear(1, 1)
        linears[path].weight.data = module.weight.data.clone()
    amount = int(sum(linear.weight.numel() for linear in linears.values()) * sparsity)
    prune.global_unstructured(
        [(linear, "weight") for linear in linears.values()], pruning_method=prune.L1Unstructured, amount=amount
    )
    run.apply(Magnitude(sparsity, scope="global"))
    for path, module in Blocks(run.model).linears():
        assert torch.equal(dense_weight(module), linears[path].weight), path


@pytest.mark.parametrize(("block", "sparsity"), [(4, 0.5), (8, 0.25), (2, 0.9)])
def test_blocks_of_the_smallest_norm_go(block: int, sparsity: float) -> None:
    layer = random_layer()
    found = dense_weight(BlockSparse(sparsity, block=block).compress(layer))
    blocks = [
        (layer.weight[i : i + block, j : j + block].norm().item(), i, j)
        for i in range(0, 24, block)
        for j in range(0, 64, block)
    ]
    expected = layer.weight.clone()
    for _, i, j in sorted(blocks)[: int(len(blocks) * sparsity)]:
        expected[i : i + block, j : j + block] = 0
    assert torch.equal(found, expected)
