"""What torchao makes of training in float8: scales, saturating casts, and a linear emulated forward and backward."""

from __future__ import annotations

import math

import torch
from golden import write
from torch import Tensor, nn
from torchao.float8.config import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
OUT, IN = 24, 40


def tensors() -> dict[str, Tensor]:
    """Numbers over many powers of two, and a linear with its inputs and the gradient of its outputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 11, generator=generator) * torch.logspace(-6, 3, 37)[:, None]
    edges = torch.tensor([448.0, 464.0, 465.0, 1e4, 57344.0, 61440.0, 1e9, math.inf, -math.inf, 2.0**-10, 2.0**-17])
    found = {"x": x, "edges": edges}
    for name, kind in FORMATS.items():
        scale = tensor_to_scale(x, kind)
        found[f"{name}.scale"] = scale
        found[f"{name}.codes"] = to_fp8_saturated(x * scale, kind).view(torch.uint8)
        found[f"{name}.edges"] = to_fp8_saturated(edges, kind).view(torch.uint8)
    linear = nn.Linear(IN, OUT)
    linear.weight.data = torch.randn(OUT, IN, generator=generator) * 0.02
    linear.bias.data = torch.randn(OUT, generator=generator)
    inputs = torch.randn(2, 5, IN, generator=generator, requires_grad=True)
    gradient = torch.randn(2, 5, OUT, generator=generator) * 1e-6
    layer = Float8Linear.from_float(linear, Float8LinearConfig(emulate=True))
    y = layer(inputs)
    y.backward(gradient)
    found |= {"weight": linear.weight, "bias": linear.bias, "inputs": inputs, "gradient": gradient, "y": y}
    found |= {"inputs.grad": inputs.grad, "weight.grad": layer.weight.grad, "bias.grad": layer.bias.grad}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


if __name__ == "__main__":
    write("float8", __file__, ["torchao"], tensors(), seed=0)
