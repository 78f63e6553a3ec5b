"""Rounding to nearest, and the uniform grids that quantizers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys_quant import golden, make_layer

from effbench.formats.grid import fit_grid
from effbench.formats.integer import IntLinear
from effbench.methods.quant.rtn import RTN


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_grid_is_that_of_compressed_tensors(bits: int, symmetric: bool) -> None:
    tensors, _ = golden("rtn")
    grid = fit_grid(tensors["weight"], bits, symmetric)
    name = f"b{bits}_{'sym' if symmetric else 'asym'}"
    assert torch.equal(grid.scale[..., 0], tensors[f"{name}.scale"])
    assert torch.equal(grid.zero[..., 0], tensors[f"{name}.zero"])


def test_the_two_published_grids_differ_where_a_group_has_one_sign() -> None:
    weight = torch.tensor([[0.5, 0.75, 1.0, 1.5]])
    ours, theirs = fit_grid(weight, 4), fit_grid(weight, 4, grid="awq")
    assert ours.scale.item() == pytest.approx(1.5 / 15) and ours.zero.item() == 0
    assert theirs.scale.item() == pytest.approx(1.0 / 15) and theirs.zero.item() == 0  # clamped from -8
    both = torch.tensor([[-0.5, 0.25, 1.0]])
    assert torch.allclose(fit_grid(both, 4).round(both), fit_grid(both, 4, grid="awq").round(both))
    assert fit_grid(both, 4, True).scale.item() == pytest.approx(2 / 15)
    assert fit_grid(both, 4, True, "awq").scale.item() == pytest.approx(1 / 7)


def test_mse_equals_a_plain_search() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) ** 3
    grid = fit_grid(weight, 3, mse=True)
    for row in range(6):
        w = weight[row]
        low, high = min(w.min().item(), 0), max(w.max().item(), 0)
        best = (float("inf"), 0.0)
        for i in range(80):
            scale = torch.tensor((1 - i / 100) * (high - low) / 7)
            zero = (-(1 - i / 100) * low / scale).round()
            error = (((w / scale).round() + zero).clamp(0, 7) - zero) * scale - w
            best = min(best, (float(error.abs().pow(2.4).sum()), float(scale)))
        assert grid.scale[row].item() == pytest.approx(best[1], rel=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("grid", ["gptq", "awq"])
def test_rtn_rounds_to_the_nearest_stored_point(granularity: Any, symmetric: bool, grid: Any) -> None:
    layer = make_layer(bias=True)
    method = RTN(bits=4, granularity=granularity, group_size=32, symmetric=symmetric, grid=grid)
    module = method.compress(layer)
    assert isinstance(module, IntLinear)
    scale, _ = module.grid()
    error = (module.dense_weight() - layer.weight).abs() / scale
    # The end of the range may lie half a step outside the grid: the zero-point is rounded.
    assert error.max() <= (1.01 if not symmetric else 0.56)
    assert (error > 0.51).float().mean() < 0.02
    rows = 1 if granularity == "tensor" else 48
    assert module.scale.shape == (rows, 4 if granularity == "group" else 1)
    x = torch.randn(3, 128)
    assert torch.allclose(module(x), x @ module.dense_weight().T + layer.bias, atol=1e-5)
