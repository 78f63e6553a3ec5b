"""What torchao's fake quantizers make of weights and activations, and the gradients that pass through them."""

from __future__ import annotations

import torch
from golden import write
from torch import Tensor
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer
from torchao.quantization.quant_primitives import _fake_quantize_affine

OUT, IN, GROUP = 8, 64, 32
DIRECTION = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(7))


def differentiate(function: object, real: Tensor) -> dict[str, Tensor]:
    """What comes of `real` [rows, n], and the gradient of a weighted sum of it."""
    leaf = real.clone().requires_grad_()
    out = function(leaf)  # type: ignore[operator]
    (out * DIRECTION).sum().backward()
    assert leaf.grad is not None
    return {"real": real.clone(), "out": out.detach(), "grad": leaf.grad}


def affine(bits: int) -> dict[str, Tensor]:
    """A given grid in groups, with numbers far beyond its ends."""
    generator = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = 0.01 + torch.rand(OUT, IN // GROUP, generator=generator)
    zero = torch.randint(low, high + 1, scale.shape, generator=generator).float()
    real = torch.randn(OUT, IN, generator=generator) * 2**bits * 0.5
    found = differentiate(lambda x: _fake_quantize_affine(x, (1, GROUP), scale, zero, torch.int32, low, high), real)
    return found | {"scale": scale, "zero": zero}


def module(real: Tensor, dtype: object, granularity: str, symmetric: bool) -> dict[str, Tensor]:
    """A quantizer that finds its own grid."""
    size = {"group_size": GROUP} if granularity == "per_group" else {}
    config = IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=symmetric, **size)  # type: ignore[arg-type]
    quantizer = IntxFakeQuantizer(config)
    found = differentiate(quantizer, real)
    assert quantizer.scale is not None and quantizer.zero_point is not None
    rows = len(real)
    scale, zero = (part.float().view(rows, -1) for part in (quantizer.scale, quantizer.zero_point))
    return found | {"scale": scale, "zero": zero}


def even(real: Tensor, levels: float) -> Tensor:
    """The same with a power of two as the step of each group, so that quotients are exact and ties are ties."""
    groups = real.view(len(real), -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    steps = torch.where(groups.abs() == largest, levels * groups.sign(), groups / largest * levels)
    return (steps * 2 ** (largest / levels).log2().round()).view(real.shape)


if __name__ == "__main__":
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.02
    tokens = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))
    tensors = {"direction": DIRECTION}
    for name, found in {
        "affine2": affine(2),
        "affine4": affine(4),
        "affine8": affine(8),
        "group4": module(weight, torch.int4, "per_group", True),
        "group4_even": module(even(weight, 7.5), torch.int4, "per_group", True),
        "group2": module(weight, torch.int2, "per_group", True),
        "channel4": module(weight, torch.int4, "per_channel", True),
        "token8": module(tokens, torch.int8, "per_token", False),
    }.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in found.items()}
    write("qat", __file__, ["torchao"], tensors, group=GROUP)
