"""FP8 weights."""

from __future__ import annotations

import torch
from toys_quant import make_layer

from effbench.methods.quant.fp8_weight import FP8Weight
from effbench.nn.model.linear import dense_weight


def test_fp8_weight() -> None:
    layer = make_layer(bias=True)
    for granularity, activations in (("row", True), ("tensor", True), ("row", False)):
        module = FP8Weight(granularity, activations).compress(layer)  # type: ignore[arg-type]
        largest = layer.weight.abs().amax(1, keepdim=True) if granularity == "row" else layer.weight.abs().max()
        scale = largest / 448
        expected = (layer.weight / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.allclose(dense_weight(module), expected, rtol=1e-6)
        x = torch.randn(5, 128)
        close = 0.0 if not activations else 0.1
        assert torch.allclose(module(x), x @ expected.T + layer.bias, atol=1e-4 + close)
